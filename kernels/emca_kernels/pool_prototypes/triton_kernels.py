"""Soft prototypes on GPUs: one pass over the pixels with a running maximum and sum, weights are never written.

A query whose mask is empty pools everywhere, and which one that is shows only at the end. So each starts by pooling everything, and starts
anew, masked, at the first pixel that it is allowed. See kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from emca_kernels.masks import EmbeddingMask, Mask
from emca_kernels.triton.arguments import MASKS, count_queries, example_mask, stream_arguments
from emca_kernels.triton.configs import Config, block_of, config_of, power_of_two, splits_of
from emca_kernels.triton.runtime import Launch, architecture
from emca_kernels.triton.tiles import MASK_EMBEDDING, MASK_NONE, dot, load_allowed, load_located, load_tile


@triton.jit
def stream_sums(
    asking,
    features,
    position,
    queries,
    mask,
    mask_features,
    rows,
    values,
    first_pixel,
    last_pixel,
    query_count,
    pixels,
    width,
    mask_width,
    features_stride_p,
    features_stride_c,
    position_stride_p,
    position_stride_c,
    queries_stride_q,
    queries_stride_c,
    mask_stride_q,
    mask_stride_p,
    mask_features_stride_p,
    mask_features_stride_e,
    SOFT: tl.constexpr,
    MASK: tl.constexpr,
    POSITION: tl.constexpr,
    RESIDENT: tl.constexpr,
    MASK_RESIDENT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Weighted sums [BLOCK_Q, BLOCK_V] of the channels `values` over one image's pixels from `first_pixel` to before `last_pixel`.

    Beside them, per query: the highest score, the sum of the weights, and 1 where anything was allowed. For the rest see
    `select_prototypes.triton_kernels.stream_best`.
    """
    channels = tl.arange(0, BLOCK_C)
    embedding = 0.0
    if MASK == MASK_EMBEDDING and MASK_RESIDENT:
        embedding = load_tile(mask, rows, tl.arange(0, BLOCK_E), mask_stride_q, mask_stride_p, query_count, mask_width, UPCAST)
    top = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    pooled = tl.zeros((BLOCK_Q, BLOCK_V), tl.float32)
    masked = tl.zeros((BLOCK_Q,), tl.int32)
    for start in range(first_pixel, last_pixel, BLOCK_P):
        pixel_rows = start + tl.arange(0, BLOCK_P)
        tile = load_located(
            features,
            position,
            pixel_rows,
            values,
            features_stride_p,
            features_stride_c,
            position_stride_p,
            position_stride_c,
            pixels,
            width,
            POSITION,
            UPCAST,
        )
        scores = tl.zeros((BLOCK_Q, BLOCK_P), tl.float32)
        if SOFT and RESIDENT:
            scores = dot(asking, tl.trans(tile), scores)
        elif SOFT:
            for first in range(0, width, BLOCK_C):
                piece = first + channels
                asked = load_tile(queries, rows, piece, queries_stride_q, queries_stride_c, query_count, width, UPCAST)
                keys = load_located(
                    features,
                    position,
                    pixel_rows,
                    piece,
                    features_stride_p,
                    features_stride_c,
                    position_stride_p,
                    position_stride_c,
                    pixels,
                    width,
                    POSITION,
                    UPCAST,
                )
                scores = dot(asked, tl.trans(keys), scores)
        counted = (pixel_rows < pixels)[None, :] & (scores == scores)
        best = tl.max(tl.where(counted, scores, -float("inf")), axis=1)
        before = top
        if MASK != MASK_NONE:
            allowed = load_allowed(
                mask,
                embedding,
                mask_features,
                rows,
                start,
                mask_stride_q,
                mask_stride_p,
                mask_features_stride_p,
                mask_features_stride_e,
                query_count,
                pixels,
                mask_width,
                MASK,
                BLOCK_Q,
                BLOCK_P,
                BLOCK_E,
                MASK_RESIDENT,
                UPCAST,
            )
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
    return pooled, top, total, masked


@triton.jit
def store_sums(sums, statistics, places, values, pooled, top, total, masked, inside, split, rows, width, is_first):
    """One split's part: `sums` is [splits, rows, D], `statistics` [splits, 3, rows], written by the first block of channels alone."""
    sums += (split.to(tl.int64) * rows + places[:, None]) * width + values[None, :]
    tl.store(sums, pooled, mask=inside[:, None] & (values < width)[None, :])
    if is_first:
        found = statistics + split.to(tl.int64) * 3 * rows + places
        tl.store(found, top, mask=inside)
        tl.store(found + rows, total, mask=inside)
        tl.store(found + 2 * rows, masked.to(tl.float32), mask=inside)


@triton.jit
def _pool_prototypes_fwd_kernel(
    features,  # [B, P, M * D]
    position,  # [B, P, M * D]
    queries,  # [B, Q, M * D]
    mask,  # [B, Q, P or words or E]
    mask_features,  # [B, P, E]
    sums,  # [splits, B, Q, M, D] weighted sums
    statistics,  # [splits, 3, B, Q, M]: maximum of the scores, sum of the weights, whether anything was allowed
    query_count,
    pixels,
    width,
    mask_width,
    span,
    rows_of_split,
    features_stride_b,
    features_stride_p,
    features_stride_c,
    position_stride_b,
    position_stride_p,
    position_stride_c,
    queries_stride_b,
    queries_stride_q,
    queries_stride_c,
    mask_stride_b,
    mask_stride_q,
    mask_stride_p,
    mask_features_stride_b,
    mask_features_stride_p,
    mask_features_stride_e,
    HEADS: tl.constexpr,
    SOFT: tl.constexpr,
    MASK: tl.constexpr,
    POSITION: tl.constexpr,
    RESIDENT: tl.constexpr,
    MASK_RESIDENT: tl.constexpr,
    BLOCKS_Q: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Weighted sums over a span of pixels, of a block of channels. Grid (splits, B * M, blocks of channels * blocks of queries)."""
    split = tl.program_id(0)
    image = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    rows = (tl.program_id(2) % BLOCKS_Q) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    block_v = tl.program_id(2) // BLOCKS_Q
    values = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
    features += image * features_stride_b + head * width * features_stride_c
    position += image * position_stride_b + head * width * position_stride_c
    queries += image * queries_stride_b + head * width * queries_stride_c
    mask += image * mask_stride_b
    mask_features += image * mask_features_stride_b

    asking = 0.0
    if SOFT and RESIDENT:
        asking = load_tile(queries, rows, tl.arange(0, BLOCK_C), queries_stride_q, queries_stride_c, query_count, width, UPCAST)
    pooled, top, total, masked = stream_sums(
        asking,
        features,
        position,
        queries,
        mask,
        mask_features,
        rows,
        values,
        split * span,
        tl.minimum(split * span + span, pixels),
        query_count,
        pixels,
        width,
        mask_width,
        features_stride_p,
        features_stride_c,
        position_stride_p,
        position_stride_c,
        queries_stride_q,
        queries_stride_c,
        mask_stride_q,
        mask_stride_p,
        mask_features_stride_p,
        mask_features_stride_e,
        SOFT,
        MASK,
        POSITION,
        RESIDENT,
        MASK_RESIDENT,
        BLOCK_Q,
        BLOCK_P,
        BLOCK_C,
        BLOCK_V,
        BLOCK_E,
        UPCAST,
    )
    places = (image * query_count + rows) * HEADS + head
    store_sums(sums, statistics, places, values, pooled, top, total, masked, rows < query_count, split, rows_of_split, width, block_v == 0)


@triton.jit
def merge_sums(sums, statistics, row, values, inside, rows, width, splits, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr):
    """Weighted means [BLOCK_R, BLOCK_V] and logs of the sums of exponentials over all splits, taken in their order.

    Splits that pooled everything count for nothing beside one that was masked.
    """
    here = inside[:, None] & (values < width)[None, :]
    top = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    merged = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    masked = tl.zeros((BLOCK_R,), tl.float32)
    for split in range(splits):
        found = statistics + tl.cast(split, tl.int64) * 3 * rows + row
        best = tl.load(found, mask=inside, other=0.0)
        weight = tl.load(found + rows, mask=inside, other=1.0)
        was_masked = tl.load(found + 2 * rows, mask=inside, other=0.0)
        part = tl.load(sums + (tl.cast(split, tl.int64) * rows + row[:, None]) * width + values[None, :], mask=here, other=0.0)
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
    sums,  # [splits, rows, D]
    statistics,  # [splits, 3, rows]
    pooled,  # [rows, D]
    logsumexp,  # [rows]
    rows,
    width,
    splits,
    SOFT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Weighted means of all splits, and the normaliser of their weights; zero without scores."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    values = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = row < rows
    means, normaliser = merge_sums(sums, statistics, row, values, inside, rows, width, splits, BLOCK_R, BLOCK_V)
    here = inside[:, None] & (values < width)[None, :]
    tl.store(pooled + row.to(tl.int64)[:, None] * width + values[None, :], means, mask=here)
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
    block_q = block_of(count, config.block_q)
    blocks_q = -(-count // block_q)
    block_v = values_of(features_BPC, width)
    blocks_v = -(-width // block_v)
    splits, span = splits_of(pixels, config.block_p, batch * heads * blocks_q * blocks_v, arch, splits)
    shape = (batch, count, heads)
    sums = features_BPC.new_empty((splits, *shape, width), dtype=torch.float32)
    statistics = features_BPC.new_empty((splits, 3, *shape), dtype=torch.float32)
    pooled = features_BPC.new_empty((*shape, width))
    logsumexp = features_BPC.new_empty(shape, dtype=torch.float32)
    rows = batch * count * heads
    arguments: dict[str, Any] = {
        **stream_arguments(features_BPC, queries_BQC, mask, position_BPC, config, width=width, block_q=block_q),
        "sums": sums,
        "statistics": statistics,
        "span": span,
        "rows_of_split": rows,
        "HEADS": heads,
        "SOFT": queries_BQC is not None,
        "BLOCKS_Q": blocks_q,
        "BLOCK_V": block_v,
    }
    grid = (splits, batch * heads, blocks_v * blocks_q)
    pool = Launch(_pool_prototypes_fwd_kernel, grid, arguments, config.num_warps, config.num_stages)
    merging: dict[str, Any] = {"sums": sums, "statistics": statistics, "pooled": pooled, "logsumexp": logsumexp}
    merging |= {"rows": rows, "width": width, "splits": splits, "SOFT": queries_BQC is not None, "BLOCK_R": 16, "BLOCK_V": block_v}
    merge = Launch(_merge_sums_kernel, (-(-rows // 16), blocks_v), merging, num_warps=4, num_stages=2)
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
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
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
        features = torch.empty(2, 32768, channels, dtype=dtypes[dtype], device="meta")
        position = features[:1].expand_as(features) if extra == "position" else None
        if extra == "pixels contiguous":
            features = features.mT.contiguous().mT
        queries = features.new_empty(2, count, channels) if soft else None
        launches, *_ = plan(features, queries, example_mask(kind, features, count), position, heads=heads, arch=arch)
        name = (dtype, "soft" if soft else "mean", f"mask={kind}", f"C={channels}", f"M={heads}", f"Q={count}", extra)
        yield " ".join(filter(None, name)), launches
