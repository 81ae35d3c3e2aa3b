"""Multi-scale deformable attention on GPUs: a program holds a block of queries of one head and gathers its samples one after the other.

Backward, samples of different queries fall on the same pixel: gradients of values are added by atomics, in no fixed order. See
kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from emca_kernels.deformable_attention.layout import reachable
from emca_kernels.deformable_attention.reference import Shapes
from emca_kernels.triton.arguments import matrix_arguments
from emca_kernels.triton.configs import power_of_two
from emca_kernels.triton.runtime import Launch


@triton.jit
def _between(coordinate, size):
    """The pixel at or before a coordinate, -2 if that is NaN or far outside, and how far behind it the coordinate lies."""
    floor = tl.floor(coordinate)
    above = tl.where(floor > -2.0, floor, -2.0)
    low = tl.where(above < size.to(tl.float32), above, size.to(tl.float32)).to(tl.int32)
    return low, coordinate - floor


@triton.jit
def _corner(base, row, column, rows, columns, first, inside, stride_p, channels, stride_c, width):
    """Float32 [BLOCK_Q, BLOCK_D] values of a pixel per query, zero beyond the border; the pixel, and whether it is inside."""
    here = inside & (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    # moved inside, so that 32 bits hold it
    pixel = tl.where(here, first + row * columns + column, 0)
    pointers = base + pixel[:, None] * stride_p + channels[None, :] * stride_c
    value = tl.load(pointers, mask=here[:, None] & (channels < width)[None, :], other=0.0)
    return value.to(tl.float32), pixel, here


@triton.jit
def _deformable_attention_fwd_kernel(
    value,  # [B, P, M, D]
    places,  # [B, Q, M, L, N, 2]: locations, or offsets in pixels
    weights,  # [B, Q, M, L, N]: weights, or logits
    reference,  # [B, Q, L, 2] if there are offsets
    levels,  # int32 [L, 3]: rows, columns, first pixel
    result,  # [B, Q, M, D]
    queries,
    width,
    value_stride_b,
    value_stride_p,
    value_stride_m,
    value_stride_d,
    reference_stride_b,
    reference_stride_q,
    reference_stride_l,
    reference_stride_x,
    HEADS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    FROM_OFFSETS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Grid (M, blocks of queries, B)."""
    head = tl.program_id(0)
    image = tl.program_id(2).to(tl.int64)
    query = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = query < queries
    channels = tl.arange(0, BLOCK_D)
    value += image * value_stride_b + head * value_stride_m
    row_of = (image * queries + query) * HEADS + head
    first_sample = row_of * (LEVELS * POINTS)
    top = tl.zeros((BLOCK_Q,), tl.float32)
    total = top
    if FROM_OFFSETS:
        samples = tl.arange(0, BLOCK_S)
        there = inside[:, None] & (samples < LEVELS * POINTS)[None, :]
        logits = tl.load(weights + first_sample[:, None] + samples[None, :], mask=there, other=-float("inf")).to(tl.float32)
        # rows beyond the end: any numbers that can be subtracted and divided by
        top = tl.where(inside, tl.max(logits, 1), 0.0)
        total = tl.where(inside, tl.sum(tl.exp(logits - top[:, None]), 1), 1.0)
    summed = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for level in range(LEVELS):
        rows = tl.load(levels + 3 * level)
        columns = tl.load(levels + 3 * level + 1)
        first = tl.load(levels + 3 * level + 2)
        origin_x = tl.zeros((BLOCK_Q,), tl.float32)
        origin_y = origin_x
        if FROM_OFFSETS:
            at = reference + image * reference_stride_b + query.to(tl.int64) * reference_stride_q + level * reference_stride_l
            origin_x = tl.load(at, mask=inside, other=0.0).to(tl.float32) * columns - 0.5
            origin_y = tl.load(at + reference_stride_x, mask=inside, other=0.0).to(tl.float32) * rows - 0.5
        for point in range(POINTS):
            sample = first_sample + level * POINTS + point
            x = tl.load(places + 2 * sample, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(places + 2 * sample + 1, mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(weights + sample, mask=inside, other=0.0).to(tl.float32)
            if FROM_OFFSETS:
                x, y = origin_x + x, origin_y + y
                weight = tl.exp(weight - top) / total
            else:
                x, y = x * columns - 0.5, y * rows - 0.5
            column, right = _between(x, columns)
            row, lower = _between(y, rows)
            for down in tl.static_range(2):
                for across in tl.static_range(2):
                    corner, _, _ = _corner(
                        value,
                        row + down,
                        column + across,
                        rows,
                        columns,
                        first,
                        inside,
                        value_stride_p,
                        channels,
                        value_stride_d,
                        width,
                    )
                    share = (lower if down == 1 else 1 - lower) * (right if across == 1 else 1 - right)
                    summed += (share * weight)[:, None] * corner
    out = result + row_of[:, None] * width + channels[None, :]
    tl.store(out, summed, mask=inside[:, None] & (channels < width)[None, :])


@triton.jit
def _deformable_attention_bwd_kernel(
    gradient,  # [B, Q, M, D]
    value,  # [B, P, M, D]
    locations,  # [B, Q, M, L, N, 2]
    weights,  # [B, Q, M, L, N]
    levels,  # int32 [L, 3]: rows, columns, first pixel
    of_value,  # float32 [B, P, M, D], zeros
    of_locations,  # as the locations
    of_weights,  # as the weights
    pixels,
    queries,
    width,
    value_stride_b,
    value_stride_p,
    value_stride_m,
    value_stride_d,
    HEADS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (M, blocks of queries, B)."""
    head = tl.program_id(0)
    image = tl.program_id(2).to(tl.int64)
    query = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = query < queries
    channels = tl.arange(0, BLOCK_D)
    value += image * value_stride_b + head * value_stride_m
    of_value += (image * pixels * HEADS + head) * width
    row_of = (image * queries + query) * HEADS + head
    whole = inside[:, None] & (channels < width)[None, :]
    incoming = tl.load(gradient + row_of[:, None] * width + channels[None, :], mask=whole, other=0.0).to(tl.float32)
    for level in range(LEVELS):
        rows = tl.load(levels + 3 * level)
        columns = tl.load(levels + 3 * level + 1)
        first = tl.load(levels + 3 * level + 2)
        for point in range(POINTS):
            sample = (row_of * LEVELS + level) * POINTS + point
            x = tl.load(locations + 2 * sample, mask=inside, other=0.0).to(tl.float32) * columns - 0.5
            y = tl.load(locations + 2 * sample + 1, mask=inside, other=0.0).to(tl.float32) * rows - 0.5
            weight = tl.load(weights + sample, mask=inside, other=0.0).to(tl.float32)
            column, right = _between(x, columns)
            row, lower = _between(y, rows)
            of_weight = tl.zeros((BLOCK_Q,), tl.float32)
            of_x = of_weight
            of_y = of_weight
            for down in tl.static_range(2):
                for across in tl.static_range(2):
                    corner, pixel, here = _corner(
                        value,
                        row + down,
                        column + across,
                        rows,
                        columns,
                        first,
                        inside,
                        value_stride_p,
                        channels,
                        value_stride_d,
                        width,
                    )
                    share_x = right if across == 1 else 1 - right
                    share_y = lower if down == 1 else 1 - lower
                    product = tl.sum(corner * incoming, 1)
                    of_weight += share_x * share_y * product
                    of_x += (1 if across == 1 else -1) * share_y * product
                    of_y += (1 if down == 1 else -1) * share_x * product
                    target = of_value + pixel[:, None] * (HEADS * width) + channels[None, :]
                    added = (share_x * share_y * weight)[:, None] * incoming
                    tl.atomic_add(target, added, mask=here[:, None] & (channels < width)[None, :], sem="relaxed")
            tl.store(of_weights + sample, of_weight, mask=inside)
            tl.store(of_locations + 2 * sample, of_x * weight * columns, mask=inside)
            tl.store(of_locations + 2 * sample + 1, of_y * weight * rows, mask=inside)


ELEMENTS = 512
"""Queries times channels of a program: four to a thread, and so many programs that their loads hide one another's latency."""
NUM_WARPS = 4


def plan(value_BPMd: Tensor, shapes: Shapes, places: Tensor, weights: Tensor, reference_BQL2: Tensor | None) -> tuple[Launch, Tensor]:
    """The launch of a forward pass and what it writes, [B, Q, M, d]; `places` and `weights` are contiguous."""
    batch, _, heads, width = value_BPMd.shape
    queries, points = places.shape[1], places.shape[4]
    result = value_BPMd.new_empty((batch, queries, heads, width))
    block_q, block_d = _blocks(width)
    arguments: dict[str, Any] = {
        **matrix_arguments("value", value_BPMd, "bpmd"),
        "places": places,
        "weights": weights,
        **matrix_arguments("reference", reference_BQL2, "bqlx", instead=value_BPMd),
        "levels": level_table(tuple(shapes), value_BPMd.device),
        "result": result,
        "queries": queries,
        "width": width,
        "HEADS": heads,
        "LEVELS": len(shapes),
        "POINTS": points,
        "FROM_OFFSETS": reference_BQL2 is not None,
        "BLOCK_Q": block_q,
        "BLOCK_D": block_d,
        "BLOCK_S": power_of_two(len(shapes) * points, least=1),
    }
    return Launch(_deformable_attention_fwd_kernel, (heads, -(-queries // block_q), batch), arguments, NUM_WARPS, 1), result


def plan_backward(
    gradient: Tensor, value_BPMd: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> tuple[Launch, tuple[Tensor, Tensor, Tensor]]:
    """The launch of a backward pass, and the gradients of value (float32), locations and weights; all but `value_BPMd` are contiguous."""
    batch, pixels, heads, width = value_BPMd.shape
    queries, points = locations.shape[1], locations.shape[4]
    of_value = torch.zeros_like(value_BPMd, dtype=torch.float32, memory_format=torch.contiguous_format)
    gradients = of_value, locations.new_empty(locations.shape), weights.new_empty(weights.shape)
    block_q, block_d = _blocks(width)
    arguments: dict[str, Any] = {
        "gradient": gradient,
        **matrix_arguments("value", value_BPMd, "bpmd"),
        "locations": locations,
        "weights": weights,
        "levels": level_table(tuple(shapes), value_BPMd.device),
        "of_value": gradients[0],
        "of_locations": gradients[1],
        "of_weights": gradients[2],
        "pixels": pixels,
        "queries": queries,
        "width": width,
        "HEADS": heads,
        "LEVELS": len(shapes),
        "POINTS": points,
        "BLOCK_Q": block_q,
        "BLOCK_D": block_d,
    }
    return Launch(_deformable_attention_bwd_kernel, (heads, -(-queries // block_q), batch), arguments, NUM_WARPS, 1), gradients


def _blocks(width: int) -> tuple[int, int]:
    block_d = power_of_two(width)
    return max(1, ELEMENTS // block_d), block_d


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
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    cases = [(dtype, 32, 8, "") for dtype in dtypes] + [("bf16", 32, 8, "exact places"), ("fp32", 64, 4, ""), ("bf16", 20, 4, "")]
    for dtype, width, heads, extra in cases:
        shapes = [(32, 64), (64, 128), (128, 256)]
        pixels = sum(rows * columns for rows, columns in shapes)
        value = torch.empty(2, pixels, heads, width, dtype=dtypes[dtype], device="meta")
        exact = torch.float32 if extra else value.dtype
        places, weights = (value.new_empty((2, pixels, heads, 3, 4, *last), dtype=exact) for last in ((2,), ()))
        reference = value.new_empty((2, pixels, 3, 2), dtype=torch.float32)
        name = " ".join(filter(None, (dtype, f"d={width}", f"M={heads}", extra)))
        yield f"{name} from offsets", (plan(value, shapes, places, weights, reference)[0],)
        yield name, (plan(value, shapes, places, weights, None)[0],)
        gradient = value.new_empty((2, pixels, heads * width))
        yield name, (plan_backward(gradient, value, shapes, places, weights)[0],)
