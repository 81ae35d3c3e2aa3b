"""Operators over sizes, dtypes, backends and passes; each result is held against the float64 reference first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from emca_kernels import pool_prototypes, select_prototypes
from emca_kernels.backends import backend_named, known_backends
from emca_kernels.specs import FORWARD, FORWARD_BACKWARD, POOL_PROTOTYPES, SELECT_PROTOTYPES, OpSpec, Sizes
from torch import Tensor

QUERIES, WIDTH, ALLOWED = 100, 256, 0.25
DTYPES = ("float32", "bfloat16")
CASES = [
    pytest.param(spec, backend, pass_, id=f"{spec.name}-{backend}-{pass_}")
    for spec in (SELECT_PROTOTYPES, POOL_PROTOTYPES)
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
    call = _select(features, queries, allowed, backend) if spec is SELECT_PROTOTYPES else _pool(features, queries, allowed, backend, pass_)
    (_check_choice if spec is SELECT_PROTOTYPES else _check_pool)(spec, call(), features, queries, allowed)
    benchmark.group = "operators"
    benchmark.extra_info.update(flops=spec.flops(sizes, pass_), least_bytes=spec.bytes(sizes, pass_))
    benchmark(call)


def _select(features: Tensor, queries: Tensor, allowed: Tensor, backend: str) -> Callable[[], Any]:
    return lambda: select_prototypes(features, queries, allowed, backend=backend)


def _pool(features: Tensor, queries: Tensor, allowed: Tensor, backend: str, pass_: str) -> Callable[[], Any]:
    if pass_ == FORWARD:
        return lambda: (pool_prototypes(features, queries, allowed, backend=backend),)
    assert pass_ == FORWARD_BACKWARD
    wanted = features.requires_grad_(), queries.requires_grad_()
    upstream = torch.randn(1, QUERIES, 1, WIDTH).to(features.dtype)

    def call() -> tuple[Tensor, ...]:
        pooled = pool_prototypes(features, queries, allowed, backend=backend)
        return pooled.detach(), *torch.autograd.grad(pooled, wanted, upstream)

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
