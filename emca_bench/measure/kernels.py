"""Calls of single operators, and of what bounds them on this machine: register-only multiply-adds, matrix products, memory traffic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from emca_kernels import (
    Projections,
    deformable_attention,
    deformable_attention_from_offsets,
    emca_attention,
    pool_prototypes,
    select_prototypes,
)
from emca_kernels.backends import Backend, backend_named, known_backends
from emca_kernels.native import library
from emca_kernels.specs import DEFORMABLE_ATTENTION, FORWARD, FORWARD_BACKWARD, SAMPLERS, SPECS, Sizes
from torch import Tensor

from emca_bench.errors import UsageError, did_you_mean, listing
from emca_bench.measure.deformable import deformable_call, deformable_sizes
from emca_bench.measure.inputs import ImpossibleError, Maker
from emca_bench.specs import CEILINGS, MASKS, Arm, parse_size

OPERATORS: dict[str, Callable[..., Any]] = {
    operator.__name__: operator
    for operator in (
        select_prototypes,
        pool_prototypes,
        emca_attention,
        deformable_attention,
        deformable_attention_from_offsets,
    )
}
SAMPLING = tuple(spec.name for spec in SAMPLERS)
"""Operators that sample, whose queries are all pixels."""

SWITCHES = ("backend", "bare")
"""backend: who serves the operator. bare: its implementation alone, without checks, choice and the operator's boundary."""

BURST_ROUNDS = 4_000_000
"""Some 20 ms on a core of 2020 or later."""
MATMUL_SIZE = 1536
TRAFFIC_BYTES = 384 * 2**20
"""Of a tensor that no cache holds: servers have third-level caches beyond 256 MiB."""


@dataclass(frozen=True)
class Work:
    """What a call does at least."""

    flops: int
    bytes: int


def kernel_call(arm: Arm, params: Mapping[str, Any], maker: Maker) -> tuple[Callable[[], Any], Work]:
    """The call of an operator's cell and its least work.

    Raises:
        ImpossibleError: it cannot run here.
        UsageError: an operator, switch or pass that does not exist.
    """
    check_kernel(arm, params)
    if params["op"] in CEILINGS:
        return ceiling_call(str(params["op"]), maker)
    sizes = _sizes(params, maker.dtype)
    pass_ = str(params.get("pass", FORWARD))
    spec = SPECS[str(params["op"])]
    work = Work(spec.flops(sizes, pass_), spec.bytes(sizes, pass_))
    if spec in SAMPLERS:
        attend, wanted = deformable_call(spec.name, _backend(arm), params, maker)
        return (attend if pass_ == FORWARD else with_backward(attend, [leaf.requires_grad_() for leaf in wanted], maker.normal)), work
    features, queries = (maker.normal(sizes.batch, rows, sizes.width) for rows in (sizes.pixels, sizes.queries))
    allowed = maker.mask(sizes.batch, sizes.queries, sizes.pixels, share=float(params.get("allowed", 1.0))) if sizes.masked else None
    if spec.name == "scores":
        # into memory that is there already: the rival at its best
        scores = features.new_empty(sizes.batch, sizes.queries, sizes.pixels)
        return partial(torch.bmm, queries, features.mT, out=scores), work
    parameters = [maker.normal(*array.shape).div_(sizes.width**0.5) for array in spec.parameters(sizes).values()]
    forward = _forward(spec.name, arm, features, queries, allowed, parameters)
    if pass_ == FORWARD:
        return forward, work
    return with_backward(forward, [tensor.requires_grad_() for tensor in (features, queries, *parameters)], maker.normal), work


def with_backward(
    forward: Callable[[], Tensor], wanted: list[Tensor], noise: Callable[..., Tensor]
) -> Callable[[], tuple[Tensor | None, ...]]:
    """A call that runs `forward` and then its backward pass, and returns the gradients of the tensors that want one, None where none flows.

    Gradients are returned, not accumulated, so that one call leaves nothing behind for the next. Grad mode is its own.
    """
    with torch.enable_grad():
        upstream = noise(*forward().shape)

    def call() -> tuple[Tensor | None, ...]:
        with torch.inference_mode(False), torch.enable_grad():
            return torch.autograd.grad(forward(), wanted, upstream, allow_unused=True)

    return call


def _forward(op: str, arm: Arm, features: Tensor, queries: Tensor, allowed: Tensor | None, parameters: list[Tensor]) -> Callable[[], Any]:
    backend = _backend(arm)
    if not arm.switches.get("bare"):
        projections = [Projections(*parameters)] if parameters else []
        return partial(OPERATORS[op], features, queries, allowed, *projections, backend=backend)
    served = backend_named(op, str(backend))
    refusal = served.refuses(features, queries, allowed)
    if refusal:
        raise ImpossibleError(f"backend {backend!r} of {op}: {refusal}")
    return _bare(op, served, features, queries, allowed, parameters)


def _backend(arm: Arm) -> str | None:
    name = arm.switches.get("backend")
    return None if name is None else str(name)


def _bare(
    op: str, served: Backend, features: Tensor, queries: Tensor, allowed: Tensor | None, parameters: list[Tensor]
) -> Callable[[], Any]:
    if op == "emca_attention":
        rest = (None, None, Projections(*parameters), None)
        return partial(served.implementation, features, queries, allowed, *rest, selection="argmax", residual="projected")
    options = {"k": 1, "heads": 1} if op == "select_prototypes" else {"heads": 1}
    return partial(served.implementation, features, queries, allowed, None, **options)


def _sizes(params: Mapping[str, Any], dtype: torch.dtype) -> Sizes:
    if params["op"] in SAMPLING:
        return deformable_sizes(params, dtype.itemsize)
    height, width = parse_size(str(params["pixels"]), what="parameter 'pixels'")
    return Sizes(
        batch=int(params["batch"]),
        pixels=height * width,
        queries=int(params["queries"]),
        width=int(params["width"]),
        itemsize=dtype.itemsize,
        masked=params.get("mask", MASKS[0]) == "bool",
    )


def ceiling_call(op: str, maker: Maker) -> tuple[Callable[[], Any], Work]:
    """A call that reaches what this machine can do, and what it does.

    `burst`: multiply-adds in registers on all threads. `matmul`: a large matrix product of the maker's dtype. `copy` and `read`: a
    tensor that no cache holds; a copy counts its reads and its writes.
    """
    if op == "burst":
        reason = library.unavailable() if maker.device == "cpu" else f"{maker.device} has no register-only multiply-adds here"
        if reason:
            raise ImpossibleError(f"no native library: {reason}")
        done = torch.ops.emca_native.burst(1)
        return partial(torch.ops.emca_native.burst, BURST_ROUNDS), Work(2 * done * BURST_ROUNDS, 0)
    if op == "matmul":
        left, right = maker.normal(MATMUL_SIZE, MATMUL_SIZE), maker.normal(MATMUL_SIZE, MATMUL_SIZE)
        nbytes = 3 * left.numel() * left.element_size()
        return partial(torch.mm, left, right, out=torch.empty_like(left)), Work(2 * MATMUL_SIZE**3, nbytes)
    source, target = _large_tensors(TRAFFIC_BYTES, maker.device)
    if op == "copy":
        return partial(target.copy_, source), Work(0, 2 * TRAFFIC_BYTES)
    return source.sum, Work(source.numel(), TRAFFIC_BYTES)


@cache
def _large_tensors(nbytes: int, device: str) -> tuple[Tensor, Tensor]:
    """Float32 zeros and ones, shared by all cells; written beforehand, since a page that was never touched costs more than its traffic."""
    return torch.zeros(nbytes // 4, device=device).fill_(0.0), torch.ones(nbytes // 4, device=device)


def check_kernel(arm: Arm, params: Mapping[str, Any]) -> None:
    """Complain about an unknown operator, switch, backend or pass.

    Raises:
        UsageError: naming it and what is known.
    """
    op, known = str(params["op"]), (*SPECS, *CEILINGS)
    if op not in known:
        raise UsageError(f"unknown operator {op!r}{did_you_mean(op, known)}; known: {listing(known)}")
    for switch in arm.switches:
        if switch not in SWITCHES:
            raise UsageError(f"operator {op} has no switch {switch!r}{did_you_mean(switch, SWITCHES)}; its switches: {listing(SWITCHES)}")
    if op in CEILINGS:
        return
    if params.get("pass", FORWARD) not in SPECS[op].products:
        raise UsageError(f"operator {op} has no pass {params['pass']!r}; its passes: {listing(SPECS[op].products)}")
    if op not in SAMPLING and "queries" not in params:
        raise UsageError(f"operator {op} needs the parameter 'queries'")
    if op in SAMPLING:
        deformable_sizes(params, itemsize=4)
    backend = arm.switches.get("backend")
    # one choice of a backend stands for both forms of deformable attention
    served = known_backends(DEFORMABLE_ATTENTION.name if op in SAMPLING else op) if op in OPERATORS else ()
    if op in OPERATORS and backend is not None and backend not in served:
        raise UsageError(f"{backend!r} is no backend of {op}{did_you_mean(str(backend), served)}; known: {listing(served)}")
    if arm.switches.get("bare") and op in SAMPLING:
        raise UsageError(f"arm {arm.name!r}: operator {op} has no bare form")
    if arm.switches.get("bare") and ("backend" not in arm.switches or params.get("pass", FORWARD) == FORWARD_BACKWARD):
        raise UsageError(f"arm {arm.name!r}: bare=true needs a backend and the pass 'forward'")
