"""Soft prototypes on GPUs: one pass over the pixels with a running maximum and sum, weights are never written.

A query whose mask is empty pools everywhere, and which one that is shows only at the end. So each starts by pooling everything, and starts
anew, masked, at the first pixel that it is allowed. See kernels/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from emca_kernels.masks import EmbeddingMask, Mask
from emca_kernels.triton.arguments import constants, count_queries, stream_of, tiling_of
from emca_kernels.triton.configs import Config, config_of, power_of_two, shares_of
from emca_kernels.triton.examples import MASKS, described, example
from emca_kernels.triton.runtime import Launch, architecture
from emca_kernels.triton.tiles import (
    MASK_NONE,
    Asking,
    contiguous,
    dot,
    image_of,
    load_allowed,
    load_embedding,
    load_located,
    load_resident,
    load_scores,
    matrix_of,
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
def _pool_prototypes_fwd_kernel(
    stream,
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
    queries = matrix_of(stream.queries, image, stream.query_count, stream.width, head * stream.width)
    tile = load_resident(queries, rows, TILING.BLOCK_C, SOFT and TILING.RESIDENT, TILING.UPCAST)
    seen = image_of(stream, image, head * stream.width)
    last = tl.minimum(split * span + span, stream.pixels)
    found = stream_sums(Asking(rows, queries, tile), seen, values, split * span, last, SOFT, TILING)
    places = (image * stream.query_count + rows) * HEADS + head
    store_sums(parts, split, places, rows < stream.query_count, values, found, block_v == 0)


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
def _merge_sums_kernel(
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


NARROW = 64
WIDEST_VALUES = 256
"""Channels whose sums a program keeps; half of that in float32."""


def config_for(features: Tensor, width: int, mask: Mask | None, position: Tensor | None, arch: int) -> Config:
    """The tiles of a call; `width` is that of a head."""
    scope = "narrow" if width <= NARROW else "plain"
    if isinstance(mask, EmbeddingMask):
        scope = "embedding" if position is None else "embedding+position"
    return config_of("pool_prototypes", arch, features.dtype, scope)


def values_of(features: Tensor, width: int) -> int:
    """How many channels' sums a program keeps."""
    return min(power_of_two(width), WIDEST_VALUES // (2 if features.dtype == torch.float32 else 1))


def empty_parts(like: Tensor, splits: int, shape: tuple[int, ...], width: int) -> Parts:
    """Room for what `splits` programs leave for each row; `shape` is that of the rows."""
    sums = like.new_empty((splits, *shape, width), dtype=torch.float32)
    return Parts(sums, like.new_empty((splits, 3, *shape), dtype=torch.float32), math.prod(shape), width)


def plan(
    features_BPC: Tensor,
    queries_BQC: Tensor | None,
    mask: Mask | None,
    position_BPC: Tensor | None,
    *,
    heads: int,
    arch: int,
    splits: int | None = None,
) -> tuple[tuple[Launch, Launch], Tensor, Tensor]:
    """The launches of one call and what they write: pooled features and logsumexp. See `select_prototypes.triton_kernels.plan`."""
    batch, pixels = features_BPC.shape[:2]
    width = features_BPC.shape[2] // heads
    config = config_for(features_BPC, width, mask, position_BPC, arch)
    count = count_queries(queries_BQC, mask)
    block_v = values_of(features_BPC, width)
    blocks_v = -(-width // block_v)
    block_q, blocks_q, splits, span = shares_of(config, count, pixels, batch * heads * blocks_v, arch, splits)
    shape = (batch, count, heads)
    parts = empty_parts(features_BPC, splits, shape, width)
    pooled = features_BPC.new_empty((*shape, width))
    logsumexp = features_BPC.new_empty(shape, dtype=torch.float32)
    arguments = {
        "stream": stream_of(features_BPC, queries_BQC, mask, position_BPC, width=width),
        "parts": parts,
        "span": span,
        "HEADS": heads,
        "SOFT": queries_BQC is not None,
        "BLOCKS_Q": blocks_q,
        "BLOCK_V": block_v,
        "TILING": constants(tiling_of(features_BPC, mask, position_BPC, config, width=width, block_q=block_q)),
    }
    grid = (splits, batch * heads, blocks_v * blocks_q)
    pool = Launch(_pool_prototypes_fwd_kernel, grid, arguments, config.num_warps, config.num_stages)
    merging = {"parts": parts, "splits": splits, "pooled": pooled, "logsumexp": logsumexp}
    merging |= {"SOFT": queries_BQC is not None, "BLOCK_R": 16, "BLOCK_V": block_v}
    merge = Launch(_merge_sums_kernel, (-(-parts.rows // 16), blocks_v), merging, num_warps=4, num_stages=2)
    return (pool, merge), pooled, logsumexp


def pool_prototypes(
    features_BPC: Tensor,
    queries_BQC: Tensor | None,
    mask: Mask | None,
    position_BPC: Tensor | None,
    *,
    heads: int,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See `emca_kernels.pool_prototypes.op`; scores and sums are float32, weights are rounded to the features' dtype."""
    arch = architecture(features_BPC.device)
    launches, pooled, logsumexp = plan(features_BPC, queries_BQC, mask, position_BPC, heads=heads, arch=arch, splits=splits)
    for launch in launches:
        launch.run(features_BPC.device)
    return pooled, logsumexp


def variants(arch: int) -> Iterator[tuple[str, tuple[Launch, ...]]]:
    """Name and launches of one call for each branch of the kernels and each entry of the table, on tensors without values."""
    cases = [("bf16", True, mask, 256, 1, 100, "") for mask in MASKS]
    cases += [("fp32", True, mask, 256, 1, 100, "") for mask in ("none", "bool", "embedding")]
    cases += [(dtype, False, mask, 256, 1, 100, "") for dtype in ("bf16", "fp32") for mask in ("bool", "embedding")]
    cases += [("fp16", True, "bool", 256, 1, 100, ""), ("bf16", True, "embedding", 512, 1, 100, "")]
    cases += [(dtype, True, "bool", 64, 1, 100, "") for dtype in ("bf16", "fp32")]
    cases += [(dtype, True, "bool", 256, 8, 100, "") for dtype in ("bf16", "fp32")]
    cases += [("bf16", True, "bool", 256, 1, count, "") for count in (1, 37)]
    cases += [(dtype, True, mask, 256, 1, 100, "position") for dtype in ("bf16", "fp32") for mask in ("bool", "embedding")]
    cases += [(dtype, True, "packed", 256, 1, 100, "pixels contiguous") for dtype in ("bf16", "fp32")]
    for dtype, soft, kind, channels, heads, count, extra in cases:
        features, queries, mask, position = example(dtype, kind, channels, count, extra)
        launches, *_ = plan(features, queries if soft else None, mask, position, heads=heads, arch=arch)
        how = "soft" if soft else "mean"
        yield described(dtype, how, f"mask={kind}", f"C={channels}", f"M={heads}", f"Q={count}", extra), launches
