"""Operators over sizes, dtypes, backends and passes; each result is held against the float64 reference first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from emca_kernels import Projections, emca_attention, pool_prototypes, select_prototypes
from emca_kernels.backends import backend_named, known_backends
from emca_kernels.specs import EMCA_ATTENTION, FORWARD, FORWARD_BACKWARD, POOL_PROTOTYPES, SELECT_PROTOTYPES, OpSpec, Sizes
from torch import Tensor

QUERIES, WIDTH, ALLOWED = 100, 256, 0.25
DTYPES = ("float32", "bfloat16")
CASES = [
    pytest.param(spec, backend, pass_, id=f"{spec.name}-{backend}-{pass_}")
    for spec in (SELECT_PROTOTYPES, POOL_PROTOTYPES, EMCA_ATTENTION)
    for backend in known_backends(spec.name)
    for pass_ in spec.products
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("spec", "backend", "pass_"), CASES)
def test_operator(benchmark: Any, spec: OpSpec, backend: str, pass_: str, pixels: int, dtype: str) -> None:
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    sizes = Sizes(batch=1, pixels=pixels, queries=QUERIES, width=WIDTH, itemsize=kind.itemsize)
    features, queries = torch.randn(1, pixels, WIDTH).to(kind), 0.1 * torch.randn(1, QUERIES, WIDTH).to(kind)
    allowed = torch.rand(1, QUERIES, pixels) < ALLOWED
    refusal = backend_named(spec.name, backend).refuses(features, queries, allowed)
    if refusal:
        pytest.skip(f"{backend}: {refusal}")
    call, check = CALLS[spec.name]
    parameters = [torch.randn(array.shape).div_(WIDTH**0.5).to(kind) for array in spec.parameters(sizes).values()]
    given = (features, queries, allowed, *parameters)
    timed = call(given, backend, pass_)
    check(spec, timed(), *given)
    benchmark.group = "operators"
    benchmark.extra_info.update(flops=spec.flops(sizes, pass_), least_bytes=spec.bytes(sizes, pass_))
    benchmark(timed)


def _select(given: tuple[Tensor, ...], backend: str, _: str) -> Callable[[], Any]:
    return lambda: select_prototypes(*given, backend=backend)


def _pool(given: tuple[Tensor, ...], backend: str, pass_: str) -> Callable[[], Any]:
    return _differentiable(lambda: pool_prototypes(*given, backend=backend), given, pass_)


def _attend(given: tuple[Tensor, ...], backend: str, pass_: str) -> Callable[[], Any]:
    return _differentiable(lambda: emca_attention(*given[:3], Projections(*given[3:]), backend=backend), given, pass_)


def _differentiable(forward: Callable[[], Tensor], given: tuple[Tensor, ...], pass_: str) -> Callable[[], tuple[Tensor, ...]]:
    """The result, and with the pass forward_backward the gradients of all floating-point tensors."""
    if pass_ == FORWARD:
        return lambda: (forward(),)
    assert pass_ == FORWARD_BACKWARD
    wanted = [tensor.requires_grad_() for tensor in given if tensor.is_floating_point()]
    upstream = torch.randn_like(forward())

    def call() -> tuple[Tensor, ...]:
        result = forward()
        return result.detach(), *torch.autograd.grad(result, wanted, upstream)

    return call


def _check_choice(spec: OpSpec, found: Any, features: Tensor, queries: Tensor, allowed: Tensor) -> None:
    """The float64 score of the choice is the best there is, up to the regret that the dtype allows."""
    scores = queries.double() @ features.double().mT
    best = scores.masked_fill(~allowed, -torch.inf).amax(-1)
    chosen = scores.gather(-1, found[0][:, :, 0]).squeeze(-1)
    assert allowed.gather(-1, found[0][:, :, 0]).all()
    # the reference sums in the dtype itself
    regret = max(spec.tolerance[str(features.dtype).removeprefix("torch.")], torch.finfo(features.dtype).eps)
    assert (best - chosen).max() <= 2 * regret * scores.abs().max()


def _check_pool(spec: OpSpec, found: Any, features: Tensor, queries: Tensor, allowed: Tensor) -> None:
    wanted = pool_prototypes(features.detach().double(), queries.detach().double(), allowed, backend="reference")
    tolerance = spec.tolerance[str(features.dtype).removeprefix("torch.")]
    assert (found[0].double() - wanted).abs().max() <= tolerance * max(1.0, float(wanted.abs().max()))
    assert all(gradient.isfinite().all() for gradient in found[1:])


def _check_layer(spec: OpSpec, found: Any, *given: Tensor) -> None:
    """As in float64, every query; half precision may choose another pixel of nearly the same score, and is held by `tests/kernels`."""
    assert all(tensor.isfinite().all() for tensor in found)
    if found[0].dtype == torch.float32:
        features, queries, allowed, *parameters = (tensor.detach().double() if tensor.is_floating_point() else tensor for tensor in given)
        wanted = emca_attention(features, queries, allowed, Projections(*parameters), backend="reference")
        assert (found[0].double() - wanted).abs().max() <= spec.tolerance["float32"] * wanted.abs().max()


CALLS = {
    "select_prototypes": (_select, _check_choice),
    "pool_prototypes": (_pool, _check_pool),
    "emca_attention": (_attend, _check_layer),
}
"""By operator: what is timed, and what holds its result against float64."""
