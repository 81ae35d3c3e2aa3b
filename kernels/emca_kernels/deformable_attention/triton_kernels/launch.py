"""From a call of the operator to its launch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from emca_kernels.deformable_attention.layout import reachable
from emca_kernels.deformable_attention.reference import Shapes
from emca_kernels.deformable_attention.triton_kernels.kernels import (
    References,
    Sizes,
    Values,
    deformable_attention_bwd_kernel,
    deformable_attention_fwd_kernel,
)
from emca_kernels.triton.arguments import constants, strided
from emca_kernels.triton.configs import power_of_two
from emca_kernels.triton.examples import DTYPES, described
from emca_kernels.triton.runtime import Launch

ELEMENTS = 512
"""Queries times channels of a program: four to a thread, and so many programs that their loads hide one another's latency."""
NUM_WARPS = 4


def plan(value_BPMd: Tensor, shapes: Shapes, places: Tensor, weights: Tensor, reference_BQL2: Tensor | None) -> tuple[Launch, Tensor]:
    """The launch of a forward pass and what it writes, [B, Q, M, d]; `places` and `weights` are contiguous."""
    batch, pixels, heads, width = value_BPMd.shape
    queries = places.shape[1]
    result = value_BPMd.new_empty((batch, queries, heads, width))
    sizes = _sizes(value_BPMd, places)
    arguments = {
        "values": strided(Values, value_BPMd, instead=value_BPMd),
        "places": places,
        "weights": weights,
        "references": strided(References, reference_BQL2, instead=value_BPMd),
        "levels": level_table(tuple(shapes), value_BPMd.device),
        "result": result,
        "pixels": pixels,
        "count": queries,
        "width": width,
        "FROM_OFFSETS": reference_BQL2 is not None,
        "SIZES": constants(sizes),
    }
    return Launch(deformable_attention_fwd_kernel, (heads, -(-queries // sizes.BLOCK_Q), batch), arguments, NUM_WARPS, 1), result


def plan_backward(
    gradient: Tensor, value_BPMd: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> tuple[Launch, tuple[Tensor, Tensor, Tensor]]:
    """The launch of a backward pass, and the gradients of value (float32), locations and weights; all but `value_BPMd` are contiguous."""
    batch, pixels, heads, width = value_BPMd.shape
    queries = locations.shape[1]
    of_value = torch.zeros_like(value_BPMd, dtype=torch.float32, memory_format=torch.contiguous_format)
    gradients = of_value, locations.new_empty(locations.shape), weights.new_empty(weights.shape)
    sizes = _sizes(value_BPMd, locations)
    arguments = {
        "gradient": gradient,
        "values": strided(Values, value_BPMd, instead=value_BPMd),
        "locations": locations,
        "weights": weights,
        "levels": level_table(tuple(shapes), value_BPMd.device),
        "of_value": gradients[0],
        "of_locations": gradients[1],
        "of_weights": gradients[2],
        "pixels": pixels,
        "count": queries,
        "width": width,
        "SIZES": constants(sizes),
    }
    return Launch(deformable_attention_bwd_kernel, (heads, -(-queries // sizes.BLOCK_Q), batch), arguments, NUM_WARPS, 1), gradients


def _sizes(value_BPMd: Tensor, places_BQMLN2: Tensor) -> Sizes:
    heads, levels, points = places_BQMLN2.shape[2:5]
    block_d = power_of_two(value_BPMd.shape[3])
    return Sizes(heads, levels, points, max(1, ELEMENTS // block_d), block_d, power_of_two(levels * points, least=1))


# kept for good, 12 bytes a level: a captured CUDA graph reads it again
@cache
def level_table(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Rows, columns and first pixel of each level, int32 [L, 3]."""
    table, first = [], 0
    for rows, columns in shapes:
        table.append((rows, columns, first))
        first += rows * columns
    return torch.tensor(table, dtype=torch.int32, device=device)


def deformable_attention(value_BPMd: Tensor, shapes: Shapes, locations_BQMLN2: Tensor, weights_BQMLN: Tensor) -> Tensor:
    """See `emca_kernels.deformable_attention`; sums are float32."""
    launch, result = plan(reachable(value_BPMd), shapes, locations_BQMLN2.contiguous(), weights_BQMLN.contiguous(), None)
    launch.run(value_BPMd.device)
    return result.flatten(2)


def deformable_attention_from_offsets(
    value_BPMd: Tensor, shapes: Shapes, reference_BQL2: Tensor, offsets_BQMLN2: Tensor, logits_BQMLN: Tensor
) -> Tensor:
    """See `emca_kernels.deformable_attention_from_offsets`; neither locations nor weights are written."""
    launch, result = plan(reachable(value_BPMd), shapes, offsets_BQMLN2.contiguous(), logits_BQMLN.contiguous(), reference_BQL2)
    launch.run(value_BPMd.device)
    return result.flatten(2)


def backward(
    gradient_BQC: Tensor, value_BPMd: Tensor, shapes: Shapes, locations_BQMLN2: Tensor, weights_BQMLN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights. That of value is added up in any order: its last bits may change from call to call."""
    given = gradient_BQC.contiguous(), reachable(value_BPMd), shapes, locations_BQMLN2.contiguous(), weights_BQMLN.contiguous()
    launch, (of_value, *others) = plan_backward(*given)
    launch.run(value_BPMd.device)
    return of_value.to(value_BPMd.dtype), others[0], others[1]


def variants(arch: int) -> Iterator[tuple[str, tuple[Launch, ...]]]:
    """Name and launches of one call for each branch of the kernels, on tensors without values; Mask2Former's sizes first."""
    cases = [(dtype, 32, 8, "") for dtype in DTYPES] + [("bf16", 32, 8, "exact places"), ("fp32", 64, 4, ""), ("bf16", 20, 4, "")]
    for dtype, width, heads, extra in cases:
        shapes = [(32, 64), (64, 128), (128, 256)]
        pixels = sum(rows * columns for rows, columns in shapes)
        value = torch.empty(2, pixels, heads, width, dtype=DTYPES[dtype], device="meta")
        exact = torch.float32 if extra else value.dtype
        places, weights = (value.new_empty((2, pixels, heads, 3, 4, *last), dtype=exact) for last in ((2,), ()))
        reference = value.new_empty((2, pixels, 3, 2), dtype=torch.float32)
        name = described(dtype, f"d={width}", f"M={heads}", extra)
        yield f"{name} from offsets", (plan(value, shapes, places, weights, reference)[0],)
        yield name, (plan(value, shapes, places, weights, None)[0],)
        gradient = value.new_empty((2, pixels, heads * width))
        yield name, (plan_backward(gradient, value, shapes, places, weights)[0],)
