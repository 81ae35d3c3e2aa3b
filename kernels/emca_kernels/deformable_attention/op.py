"""The operators `deformable_attention` and `deformable_attention_from_offsets`: checks, backend, call, gradients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from emca_kernels.autocast import follow_autocast
from emca_kernels.backends import Backend, choose_backend, register_backend, serves_all
from emca_kernels.checks import check_same, check_tensor
from emca_kernels.deformable_attention import native, reference
from emca_kernels.deformable_attention.layout import too_many
from emca_kernels.deformable_attention.reference import Shapes, locations_and_weights, sizes_of
from emca_kernels.native import library
from emca_kernels.registration import register_gradient, register_operator
from emca_kernels.triton import runtime

_TRITON = "emca_kernels.deformable_attention.triton_kernels"


def _native_refuses(value: Tensor, *others: Tensor | None) -> str | None:
    return library.refuses(value, *others) or too_many(value)


def _triton_refuses(value: Tensor, *others: Tensor | None) -> str | None:
    return runtime.refuses(value, *others) or too_many(value)


register_backend("deformable_attention", Backend("reference", reference.deformable_attention, serves_all))
register_backend("deformable_attention", Backend("native", native.deformable_attention, _native_refuses))
register_backend(
    "deformable_attention",
    Backend("triton", runtime.lazily(_TRITON, "deformable_attention"), _triton_refuses, runtime.refuses_unasked),
)

# a backend that is chosen for `deformable_attention` is chosen for all of these
_FROM_OFFSETS: dict[str, Callable[..., Tensor]] = {
    "reference": reference.deformable_attention_from_offsets,
    "native": native.deformable_attention_from_offsets,
    "triton": runtime.lazily(_TRITON, "deformable_attention_from_offsets"),
}
_BACKWARD: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
    "reference": reference.backward,
    "native": native.backward,
    "triton": runtime.lazily(_TRITON, "backward"),
}
_IN_ANY_ORDER = ("triton",)
"""Whose backward passes add to the gradient of `value` in the order in which threads arrive."""


def _attend(value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor, backend: str | None) -> Tensor:
    chosen, _ = choose_backend("deformable_attention", value, locations, weights, asked=backend)
    return chosen.implementation(value, _shapes(sizes), locations, weights).contiguous()


def _attend_from_offsets(
    value: Tensor, sizes: list[int], reference_points: Tensor, offsets: Tensor, logits: Tensor, backend: str | None
) -> Tensor:
    chosen, _ = choose_backend("deformable_attention", value, offsets, logits, asked=backend)
    return _FROM_OFFSETS[chosen.name](value, _shapes(sizes), reference_points, offsets, logits).contiguous()


def _attend_backward(
    gradient: Tensor, value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    chosen, _ = choose_backend("deformable_attention", value, locations, weights, asked=backend)
    if chosen.name in _IN_ANY_ORDER:
        _alert_any_order()
    of_value, of_locations, of_weights = _BACKWARD[chosen.name](gradient, value, _shapes(sizes), locations, weights)
    return of_value.contiguous(), of_locations.contiguous(), of_weights.contiguous()


def _alert_any_order() -> None:
    """Raise or warn where `torch.use_deterministic_algorithms` asks for it, as torch's own operators do."""
    if not torch.are_deterministic_algorithms_enabled():
        return
    message = "the backward pass of deformable_attention on a GPU adds to the gradient of value in no fixed order"
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(f"{message}, and torch.use_deterministic_algorithms(True) is set; on a CPU its order is fixed")
    warnings.warn(message, stacklevel=2)


def _shapes(sizes: Sequence[int]) -> Shapes:
    return list(zip(sizes[::2], sizes[1::2], strict=True))


def _fake(value: Tensor, sizes: list[int], locations: Tensor, weights: Tensor, backend: str | None) -> Tensor:
    batch, _, heads, width = value.shape
    return value.new_empty((batch, locations.shape[1], heads * width))


def _from_offsets_fake(
    value: Tensor, sizes: list[int], reference_points: Tensor, offsets: Tensor, logits: Tensor, backend: str | None
) -> Tensor:
    return _fake(value, sizes, offsets, logits, backend)


def _backward_fake(gradient: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    value, _, locations, weights, _ = given
    return value.new_empty(value.shape), locations.new_empty(locations.shape), weights.new_empty(weights.shape)


def _flops(value: Any, sizes: Any, locations: Any, weights: Any, *_: Any, **__: Any) -> int:
    # four corners of every sample, and every channel
    return 2 * 4 * math.prod(weights) * value[-1]


def _from_offsets_flops(value: Any, sizes: Any, reference_points: Any, offsets: Any, logits: Any, *_: Any, **__: Any) -> int:
    return _flops(value, sizes, offsets, logits)


def _backward_flops(gradient: Any, value: Any, sizes: Any, locations: Any, weights: Any, *_: Any, **__: Any) -> int:
    # of the values, and of their weights
    return 2 * _flops(value, sizes, locations, weights)


_operator = register_operator(
    "deformable_attention(Tensor value, SymInt[] sizes, Tensor locations, Tensor weights, str? backend) -> Tensor",
    _attend,
    fake=_fake,
    flops=_flops,
)
_from_offsets_operator = register_operator(
    "deformable_attention_from_offsets(Tensor value, SymInt[] sizes, Tensor reference_points, Tensor offsets, Tensor logits, str? backend)"
    " -> Tensor",
    _attend_from_offsets,
    fake=_from_offsets_fake,
    flops=_from_offsets_flops,
)
_backward_operator = register_operator(
    "deformable_attention_backward(Tensor gradient, Tensor value, SymInt[] sizes, Tensor locations, Tensor weights, str? backend)"
    " -> (Tensor, Tensor, Tensor)",
    _attend_backward,
    fake=_backward_fake,
    flops=_backward_flops,
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.sizes, locations, weights, ctx.backend = inputs
    ctx.save_for_backward(value, locations, weights)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, weights = ctx.saved_tensors
    of_value, of_locations, of_weights = _backward_operator(gradient, value, ctx.sizes, locations, weights, ctx.backend)
    return of_value, None, of_locations, of_weights, None


def _keep_from_offsets(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.sizes, reference_points, offsets, logits, ctx.backend = inputs
    ctx.save_for_backward(value, reference_points, offsets, logits)


def _gradients_from_offsets(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Locations and weights are computed once more, and their gradients lead back to what they are made of."""
    value, reference_points, offsets, logits = ctx.saved_tensors
    shapes = _shapes(ctx.sizes)
    locations, weights = locations_and_weights(shapes, reference_points, offsets, logits)
    of_value, of_locations, of_weights = _backward_operator(gradient, value, ctx.sizes, locations, weights, ctx.backend)
    of_offsets = (of_locations / sizes_of(shapes, locations.dtype, locations.device)).to(offsets.dtype)
    weighted = weights * of_weights
    of_logits = (weighted - weights * weighted.sum((-2, -1), keepdim=True)).to(logits.dtype)
    of_reference = of_locations.sum((2, 4)).to(reference_points.dtype) if ctx.needs_input_grad[2] else None
    return of_value, None, of_reference, of_offsets, of_logits, None


register_gradient("deformable_attention", _keep, _gradients)
register_gradient("deformable_attention_from_offsets", _keep_from_offsets, _gradients_from_offsets)


def deformable_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Weighted sum of bilinear samples of several feature levels, per query and head.

    Zeros beyond the border; sample positions are pixel centres at (i + 0.5) / size. A position that is not finite gives NaN.

    Source: Zhu et al., Deformable DETR, 2021, equation 3.

    Args:
        value: [B, P, M, d] values of all levels, one after the other, P = sum of h * w.
        spatial_shapes: (h, w) of each level, both positive.
        sampling_locations: [B, Q, M, L, N, 2] as (x, y) in 0..1 of each level, N points; of the dtype of value, or float32 beside half
            precision, which is not enough for positions on large maps.
        attention_weights: [B, Q, M, L, N], dtypes as for the locations.
        backend: a backend's name, for tests and measurements.

    Returns:
        [B, Q, M * d], summed in float32 at least.

    Raises:
        TypeError, ValueError: naming the argument, what was found and what was expected.
    """
    value, sampling_locations, attention_weights = follow_autocast(value, sampling_locations, attention_weights, widest=True)
    flat, sizes = _check_value(value, spatial_shapes)
    _check_samples("sampling_locations", sampling_locations, ("B", "Q", "M", "L", "N", "2"), value, sizes)
    _check_samples("attention_weights", attention_weights, ("B", "Q", "M", "L", "N"), value, sizes)
    return _operator(value, flat, sampling_locations, attention_weights, backend)


def deformable_attention_from_offsets(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """`deformable_attention` with what its locations and weights are made of, which the fast backends never write.

    Samples are taken at `reference_points + sampling_offsets / (w, h)`, and weighted by the softmax of the logits over all L * N samples
    of a query and head.

    Args:
        value: [B, P, M, d], see `deformable_attention`.
        spatial_shapes: (h, w) of each level, both positive.
        reference_points: (x, y) in 0..1, floating point of any precision: [Q, 2] for all images and levels, or [B, Q, L, 2].
        sampling_offsets: [B, Q, M, L, N, 2] as (x, y) in pixels of the level; of the dtype of value, or float32 beside half precision.
        attention_logits: [B, Q, M, L, N], dtypes as for the offsets.
        backend: a backend's name, for tests and measurements.

    Returns:
        [B, Q, M * d], summed in float32 at least.

    Raises:
        TypeError, ValueError: naming the argument, what was found and what was expected.
    """
    value, sampling_offsets, attention_logits = follow_autocast(value, sampling_offsets, attention_logits, widest=True)
    flat, sizes = _check_value(value, spatial_shapes)
    _check_samples("sampling_offsets", sampling_offsets, ("B", "Q", "M", "L", "N", "2"), value, sizes)
    _check_samples("attention_logits", attention_logits, ("B", "Q", "M", "L", "N"), value, sizes)
    shared = isinstance(reference_points, Tensor) and reference_points.dim() == 2
    check_tensor("reference_points", reference_points, ("Q", "2") if shared else ("B", "Q", "L", "2"), sizes)
    if reference_points.device != value.device:
        raise ValueError(f"reference_points is on {reference_points.device}, value on {value.device}: expected the same device")
    if shared:
        reference_points = reference_points[None, :, None].expand(sizes["B"], -1, sizes["L"], -1)
    return _from_offsets_operator(value, flat, reference_points, sampling_offsets, attention_logits, backend)


def _check_value(value: Tensor, spatial_shapes: Sequence[tuple[int, int]]) -> tuple[list[int], dict[str, int]]:
    """Sizes of all levels as one list, and those that the arguments share."""
    for shape in spatial_shapes:
        if len(shape) != 2 or shape[0] < 1 or shape[1] < 1:
            raise ValueError(f"spatial_shapes has a level {tuple(shape)}, expected (h, w), both positive")
    sizes = {"L": len(spatial_shapes), "2": 2, "P": sum(height * width for height, width in spatial_shapes)}
    check_tensor("value", value, ("B", "P", "M", "d"), sizes)
    return [size for shape in spatial_shapes for size in shape], sizes


def _check_samples(name: str, tensor: Tensor, dims: tuple[str, ...], value: Tensor, sizes: dict[str, int]) -> None:
    check_tensor(name, tensor, dims, sizes)
    if tensor.dtype != torch.float32 or value.dtype not in (torch.bfloat16, torch.float16):
        check_same("value", value, name, tensor)
    elif tensor.device != value.device:
        raise ValueError(f"{name} is on {tensor.device}, value on {value.device}: expected the same device")
