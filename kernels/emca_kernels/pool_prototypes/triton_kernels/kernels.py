"""Device code: the loop over pixels, and the merging of sums."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from emca_kernels.triton.tiles import (
    MASK_NONE,
    asking_of,
    contiguous,
    dot,
    image_of,
    load_allowed,
    load_embedding,
    load_located,
    load_scores,
    store_tile,
)


class Sums(NamedTuple):
    """What a program finds in its span of pixels."""

    pooled: Any
    """Weighted sums of channels [BLOCK_Q, BLOCK_V], by weights relative to `top`."""
    top: Any
    """The highest score of each query."""
    total: Any
    """The sum of its weights."""
    masked: Any
    """1 where anything was allowed."""


class Parts(NamedTuple):
    """What programs leave for merging, in memory; a row is one query of one image and head."""

    sums: Any
    """[splits, rows, D]"""
    statistics: Any
    """[splits, 3, rows]: `top`, `total` and `masked` of `Sums`."""
    rows: Any
    width: Any
    """D"""


@triton.jit
def stream_sums(asking, image, values, first_pixel, last_pixel, SOFT: tl.constexpr, TILING: tl.constexpr):
    """Sums of the channels `values` [BLOCK_V] over one image's pixels from `first_pixel` to before `last_pixel`.

    Weights are the exponentials of scores if SOFT, else 1. If RESIDENT, `values` are all channels.
    """
    embedding = load_embedding(image.mask, asking.rows, TILING)
    top = tl.full((TILING.BLOCK_Q,), -float("inf"), tl.float32)
    total = tl.zeros((TILING.BLOCK_Q,), tl.float32)
    pooled = tl.zeros((TILING.BLOCK_Q, values.shape[0]), tl.float32)
    masked = tl.zeros((TILING.BLOCK_Q,), tl.int32)
    for start in range(first_pixel, last_pixel, TILING.BLOCK_P):
        pixel_rows = start + tl.arange(0, TILING.BLOCK_P)
        tile = load_located(image.features, image.position, pixel_rows, values, TILING.POSITION, TILING.UPCAST)
        scores = tl.zeros((TILING.BLOCK_Q, TILING.BLOCK_P), tl.float32)
        if SOFT:
            scores = load_scores(asking, image, pixel_rows, tile, TILING)
        counted = (pixel_rows < image.features.rows)[None, :] & (scores == scores)
        best = tl.max(tl.where(counted, scores, -float("inf")), axis=1)
        before = top
        if TILING.MASK != MASK_NONE:
            allowed = load_allowed(image, embedding, asking.rows, start, TILING)
            best_allowed = tl.max(tl.where(allowed, scores, -float("inf")), axis=1)
            any_allowed = (best_allowed > -float("inf")).to(tl.int32)
            before = tl.where(any_allowed > masked, -float("inf"), top)
            masked = tl.maximum(masked, any_allowed)
            best = tl.where(masked != 0, best_allowed, best)
            counted = tl.where((masked != 0)[:, None], allowed, counted)
        top = tl.maximum(before, best)
        keep = tl.exp(before - top)
        weights = tl.exp(tl.where(counted, scores - top[:, None], -float("inf")))
        total = total * keep + tl.sum(weights, axis=1)
        pooled = dot(weights.to(tile.dtype), tile, pooled * keep[:, None])
    return Sums(pooled, top, total, masked)


@triton.jit
def store_sums(parts, split, places, inside, values, found, is_first):
    """One split's part of the rows `places`; the statistics are written by the first block of channels alone."""
    sums = parts.sums + (split.to(tl.int64) * parts.rows + places[:, None]) * parts.width + values[None, :]
    tl.store(sums, found.pooled, mask=inside[:, None] & (values < parts.width)[None, :])
    if is_first:
        statistics = parts.statistics + split.to(tl.int64) * 3 * parts.rows + places
        tl.store(statistics, found.top, mask=inside)
        tl.store(statistics + parts.rows, found.total, mask=inside)
        tl.store(statistics + 2 * parts.rows, found.masked.to(tl.float32), mask=inside)


@triton.jit
def pool_prototypes_fwd_kernel(
    streamed,
    parts,  # rows [B, Q, M]
    span,
    HEADS: tl.constexpr,
    SOFT: tl.constexpr,
    BLOCKS_Q: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TILING: tl.constexpr,
):
    """Weighted sums over a span of pixels, of a block of channels. Grid (splits, B * M, blocks of channels * blocks of queries)."""
    split = tl.program_id(0)
    image = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    rows = (tl.program_id(2) % BLOCKS_Q) * TILING.BLOCK_Q + tl.arange(0, TILING.BLOCK_Q)
    block_v = tl.program_id(2) // BLOCKS_Q
    values = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
    asking = asking_of(streamed, image, rows, head * streamed.width, SOFT and TILING.RESIDENT, TILING)
    seen = image_of(streamed, image, head * streamed.width)
    last = tl.minimum(split * span + span, streamed.pixels)
    found = stream_sums(asking, seen, values, split * span, last, SOFT, TILING)
    places = (image * streamed.query_count + rows) * HEADS + head
    store_sums(parts, split, places, rows < streamed.query_count, values, found, block_v == 0)


@triton.jit
def merge_sums(parts, splits, row, inside, values):
    """Weighted means [row, values] and logs of the sums of exponentials over all splits, taken in their order.

    Splits that pooled everything count for nothing beside one that was masked.
    """
    here = inside[:, None] & (values < parts.width)[None, :]
    top = tl.full((row.shape[0],), -float("inf"), tl.float32)
    total = tl.zeros((row.shape[0],), tl.float32)
    merged = tl.zeros((row.shape[0], values.shape[0]), tl.float32)
    masked = tl.zeros((row.shape[0],), tl.float32)
    for split in range(splits):
        found = parts.statistics + tl.cast(split, tl.int64) * 3 * parts.rows + row
        best = tl.load(found, mask=inside, other=0.0)
        weight = tl.load(found + parts.rows, mask=inside, other=1.0)
        was_masked = tl.load(found + 2 * parts.rows, mask=inside, other=0.0)
        sums = parts.sums + (tl.cast(split, tl.int64) * parts.rows + row[:, None]) * parts.width + values[None, :]
        part = tl.load(sums, mask=here, other=0.0)
        before = tl.where(was_masked > masked, -float("inf"), top)
        masked = tl.maximum(masked, was_masked)
        best = tl.where(was_masked < masked, -float("inf"), best)
        top = tl.maximum(before, best)
        keep = tl.exp(before - top)
        add = tl.exp(best - top)
        total = total * keep + weight * add
        merged = merged * keep[:, None] + part * add[:, None]
    return merged / total[:, None], top + tl.log(total)


@triton.jit
def merge_sums_kernel(
    parts,
    splits,
    pooled,  # [rows, D]
    logsumexp,  # [rows]
    SOFT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Weighted means of all splits, and the normaliser of their weights; zero without scores."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    values = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = row < parts.rows
    means, normaliser = merge_sums(parts, splits, row, inside, values)
    store_tile(contiguous(pooled, parts.rows, parts.width), row, values, means)
    if tl.program_id(1) == 0:
        tl.store(logsumexp + row, normaliser if SOFT else tl.zeros((BLOCK_R,), tl.float32), mask=inside)
