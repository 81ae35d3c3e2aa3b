"""Device code: samples of a block of queries, and their gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from emca_kernels.triton.tiles import Matrix


class Values(NamedTuple):
    """[B, P, M, D] in memory."""

    base: Any
    image_stride: Any
    pixel_stride: Any
    head_stride: Any
    channel_stride: Any


class References(NamedTuple):
    """[B, Q, L, 2] in memory."""

    base: Any
    image_stride: Any
    query_stride: Any
    level_stride: Any
    axis_stride: Any


class Sizes(NamedTuple):
    """What a kernel is compiled for."""

    HEADS: int
    LEVELS: int
    POINTS: int
    """Samples of a query on each level."""
    BLOCK_Q: int
    BLOCK_D: int
    """All channels of a head."""
    BLOCK_S: int
    """All samples of a query."""


class Level(NamedTuple):
    """A map of one head's values."""

    rows: Any
    columns: Any
    first: Any
    """Its first pixel among those of all levels."""


class Queries(NamedTuple):
    """The queries of a program, all of one image and head."""

    image: Any
    head: Any
    query: Any
    """Which they are, [BLOCK_Q]."""
    inside: Any
    row: Any
    """Where they lie in [B, Q, M]."""


@triton.jit
def _queries_of(count, SIZES: tl.constexpr):
    """Those of this program. Grid (M, blocks of queries, B)."""
    head = tl.program_id(0)
    image = tl.program_id(2).to(tl.int64)
    query = tl.program_id(1) * SIZES.BLOCK_Q + tl.arange(0, SIZES.BLOCK_Q)
    return Queries(image, head, query, query < count, (image * count + query) * SIZES.HEADS + head)


@triton.jit
def _load_level(levels, level):
    return Level(tl.load(levels + 3 * level), tl.load(levels + 3 * level + 1), tl.load(levels + 3 * level + 2))


@triton.jit
def _load_sample(places, weights, sample, inside):
    """Place and weight of a sample per query, float32."""
    x = tl.load(places + 2 * sample, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(places + 2 * sample + 1, mask=inside, other=0.0).to(tl.float32)
    return x, y, tl.load(weights + sample, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _values_of(values, queries, pixels, width):
    """The values of one image and head."""
    base = values.base + (queries.image * values.image_stride + queries.head * values.head_stride)
    return Matrix(base, values.pixel_stride, values.channel_stride, pixels, width)


@triton.jit
def _between(coordinate, size):
    """The pixel at or before a coordinate, -2 if that is NaN or far outside, and how far behind it the coordinate lies."""
    floor = tl.floor(coordinate)
    above = tl.where(floor > -2.0, floor, -2.0)
    low = tl.where(above < size.to(tl.float32), above, size.to(tl.float32)).to(tl.int32)
    return low, coordinate - floor


@triton.jit
def _corner(values, level, row, column, inside, channels):
    """Float32 [BLOCK_Q, BLOCK_D] values of a pixel per query, zero beyond the border; the pixel, and whether it is inside."""
    here = inside & (row >= 0) & (row < level.rows) & (column >= 0) & (column < level.columns)
    # moved inside, so that 32 bits hold it
    pixel = tl.where(here, level.first + row * level.columns + column, 0)
    pointers = values.base + pixel[:, None] * values.row_stride + channels[None, :] * values.column_stride
    value = tl.load(pointers, mask=here[:, None] & (channels < values.columns)[None, :], other=0.0)
    return value.to(tl.float32), pixel, here


@triton.jit
def deformable_attention_fwd_kernel(
    values,
    places,  # [B, Q, M, L, N, 2]: locations, or offsets in pixels
    weights,  # [B, Q, M, L, N]: weights, or logits
    references,  # if there are offsets
    levels,  # int32 [L, 3]: rows, columns, first pixel
    result,  # [B, Q, M, D]
    pixels,
    count,
    width,
    FROM_OFFSETS: tl.constexpr,
    SIZES: tl.constexpr,
):
    """Sums of samples, for a block of queries of one image and head."""
    queries = _queries_of(count, SIZES)
    inside = queries.inside
    channels = tl.arange(0, SIZES.BLOCK_D)
    values = _values_of(values, queries, pixels, width)
    first_sample = queries.row * (SIZES.LEVELS * SIZES.POINTS)
    top = tl.zeros((SIZES.BLOCK_Q,), tl.float32)
    total = top
    if FROM_OFFSETS:
        top, total = _normaliser(weights, first_sample, inside, SIZES)
    summed = tl.zeros((SIZES.BLOCK_Q, SIZES.BLOCK_D), tl.float32)
    for number in range(SIZES.LEVELS):
        level = _load_level(levels, number)
        origin_x = tl.zeros((SIZES.BLOCK_Q,), tl.float32)
        origin_y = origin_x
        if FROM_OFFSETS:
            origin_x, origin_y = _load_origin(references, queries, number, level)
        for point in range(SIZES.POINTS):
            x, y, weight = _load_sample(places, weights, first_sample + number * SIZES.POINTS + point, inside)
            if FROM_OFFSETS:
                x, y = origin_x + x, origin_y + y
                weight = tl.exp(weight - top) / total
            else:
                x, y = x * level.columns - 0.5, y * level.rows - 0.5
            column, right = _between(x, level.columns)
            row, lower = _between(y, level.rows)
            for down in tl.static_range(2):
                for across in tl.static_range(2):
                    corner, _, _ = _corner(values, level, row + down, column + across, inside, channels)
                    share = (lower if down == 1 else 1 - lower) * (right if across == 1 else 1 - right)
                    summed += (share * weight)[:, None] * corner
    out = result + queries.row[:, None] * width + channels[None, :]
    tl.store(out, summed, mask=inside[:, None] & (channels < width)[None, :])


@triton.jit
def _normaliser(logits, first_sample, inside, SIZES: tl.constexpr):
    """The highest logit of each query, and the sum of the exponentials."""
    samples = tl.arange(0, SIZES.BLOCK_S)
    there = inside[:, None] & (samples < SIZES.LEVELS * SIZES.POINTS)[None, :]
    found = tl.load(logits + first_sample[:, None] + samples[None, :], mask=there, other=-float("inf")).to(tl.float32)
    # rows beyond the end: any numbers that can be subtracted and divided by
    top = tl.where(inside, tl.max(found, 1), 0.0)
    return top, tl.where(inside, tl.sum(tl.exp(found - top[:, None]), 1), 1.0)


@triton.jit
def _load_origin(references, queries, number, level):
    """Reference points of the queries on a level, in pixels."""
    at = references.base + queries.image * references.image_stride + queries.query.to(tl.int64) * references.query_stride
    at += number * references.level_stride
    x = tl.load(at, mask=queries.inside, other=0.0).to(tl.float32) * level.columns - 0.5
    y = tl.load(at + references.axis_stride, mask=queries.inside, other=0.0).to(tl.float32) * level.rows - 0.5
    return x, y


@triton.jit
def deformable_attention_bwd_kernel(
    gradient,  # [B, Q, M, D]
    values,
    locations,  # [B, Q, M, L, N, 2]
    weights,  # [B, Q, M, L, N]
    levels,  # int32 [L, 3]: rows, columns, first pixel
    of_value,  # float32 [B, P, M, D], zeros
    of_locations,  # as the locations
    of_weights,  # as the weights
    pixels,
    count,
    width,
    SIZES: tl.constexpr,
):
    """Gradients of values, locations and weights, for a block of queries of one image and head."""
    queries = _queries_of(count, SIZES)
    inside = queries.inside
    channels = tl.arange(0, SIZES.BLOCK_D)
    values = _values_of(values, queries, pixels, width)
    of_value += (queries.image * pixels * SIZES.HEADS + queries.head) * width
    whole = inside[:, None] & (channels < width)[None, :]
    incoming = tl.load(gradient + queries.row[:, None] * width + channels[None, :], mask=whole, other=0.0).to(tl.float32)
    for number in range(SIZES.LEVELS):
        level = _load_level(levels, number)
        for point in range(SIZES.POINTS):
            sample = (queries.row * SIZES.LEVELS + number) * SIZES.POINTS + point
            x, y, weight = _load_sample(locations, weights, sample, inside)
            column, right = _between(x * level.columns - 0.5, level.columns)
            row, lower = _between(y * level.rows - 0.5, level.rows)
            of_weight = tl.zeros((SIZES.BLOCK_Q,), tl.float32)
            of_x = of_weight
            of_y = of_weight
            for down in tl.static_range(2):
                for across in tl.static_range(2):
                    corner, pixel, here = _corner(values, level, row + down, column + across, inside, channels)
                    share_x = right if across == 1 else 1 - right
                    share_y = lower if down == 1 else 1 - lower
                    product = tl.sum(corner * incoming, 1)
                    of_weight += share_x * share_y * product
                    of_x += (1 if across == 1 else -1) * share_y * product
                    of_y += (1 if down == 1 else -1) * share_x * product
                    target = of_value + pixel[:, None] * (SIZES.HEADS * width) + channels[None, :]
                    added = (share_x * share_y * weight)[:, None] * incoming
                    tl.atomic_add(target, added, mask=here[:, None] & (channels < width)[None, :], sem="relaxed")
            tl.store(of_weights + sample, of_weight, mask=inside)
            tl.store(of_locations + 2 * sample, of_x * weight * level.columns, mask=inside)
            tl.store(of_locations + 2 * sample + 1, of_y * weight * level.rows, mask=inside)
