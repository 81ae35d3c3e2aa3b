"""Prototype selection on GPUs: queries stay on chip, pixels stream past them once, the score matrix is never written.

Each program leaves the best keys of its span of pixels, a second small launch takes the best of all. A key orders candidates by
(allowed, score, lower pixel), so any order of merging gives the same bits. See kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from emca_kernels.masks import EmbeddingMask, Mask
from emca_kernels.triton.arguments import MASKS, example_mask, stream_arguments
from emca_kernels.triton.configs import Config, block_of, config_of, power_of_two, splits_of
from emca_kernels.triton.runtime import Launch, architecture
from emca_kernels.triton.tiles import MASK_EMBEDDING, MASK_NONE, dot, load_allowed, load_located, load_tile

NOTHING = tl.constexpr(-(1 << 63))
"""Below every key."""
PIXEL_BITS = tl.constexpr(30)
LAST_PIXEL = tl.constexpr((1 << 30) - 1)


@triton.jit
def _pack(allowed, score, pixel):
    """allowed << 62 | ordered score << 30 | ~pixel, where adding 0.0 makes -0 equal to +0."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 0x80000000
    return (allowed.to(tl.int64) << 62) | (ordered << PIXEL_BITS) | (~pixel & LAST_PIXEL).to(tl.int64)


@triton.jit
def pixel_of(key):
    """The pixel that a key names."""
    return ~key & LAST_PIXEL


@triton.jit
def _score_of(key):
    bits = (((key >> PIXEL_BITS) & 0xFFFFFFFF) - 0x80000000).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _keep_best(keys, scores, allowed, start, pixels, MASK: tl.constexpr, K: tl.constexpr, BLOCK_P: tl.constexpr):
    """The K best keys of each query, of those kept so far [Q, K] and of a tile of scores [Q, P]."""
    columns = tl.arange(0, BLOCK_P)[None, :]
    for _ in tl.static_range(K):
        best = tl.max(scores, axis=1)
        winners = scores == best[:, None]
        if MASK == MASK_NONE:
            any_allowed = best == best
        else:
            best_allowed = tl.max(tl.where(allowed, scores, -float("inf")), axis=1)
            any_allowed = best_allowed > -float("inf")
            best = tl.where(any_allowed, best_allowed, best)
            winners = (scores == best[:, None]) & (allowed | (any_allowed == 0)[:, None])
        column = tl.min(tl.where(winners, columns, BLOCK_P), axis=1)
        # without a winner (every score is NaN) the column lies outside: a pixel that exists, whatever happens
        key = _pack(any_allowed, best, tl.minimum(start + column, pixels - 1))
        if K == 1:
            keys = tl.maximum(keys, key[:, None])
        else:
            # pixels used up leave -inf, which must not displace a real one
            key = tl.where(best > -float("inf"), key, NOTHING)[:, None]
            worst = tl.min(keys, axis=1)[:, None]
            keys = tl.where((keys == worst) & (key > worst), key, keys)
            scores = tl.where(columns == column[:, None], -float("inf"), scores)
    return keys


@triton.jit
def stream_best(
    asking,
    features,
    position,
    queries,
    mask,
    mask_features,
    rows,
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
    K: tl.constexpr,
    MASK: tl.constexpr,
    POSITION: tl.constexpr,
    RESIDENT: tl.constexpr,
    MASK_RESIDENT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The K best keys [BLOCK_Q, K] of one image's pixels from `first_pixel` to before `last_pixel`, for the queries `rows`.

    Pointers are those of the image and head. `asking` is the tile of all channels of these queries if RESIDENT; else pieces of them are
    loaded from `queries`.
    """
    channels = tl.arange(0, BLOCK_C)
    embedding = 0.0
    if MASK == MASK_EMBEDDING and MASK_RESIDENT:
        embedding = load_tile(mask, rows, tl.arange(0, BLOCK_E), mask_stride_q, mask_stride_p, query_count, mask_width, UPCAST)
    # kept keys differ from each other, so that one of them is the worst
    kept = tl.zeros((BLOCK_Q, K), tl.int64) + (tl.arange(0, K).to(tl.int64) + NOTHING)[None, :]
    for start in range(first_pixel, last_pixel, BLOCK_P):
        pixel_rows = start + tl.arange(0, BLOCK_P)
        scores = tl.zeros((BLOCK_Q, BLOCK_P), tl.float32)
        if RESIDENT:
            tile = load_located(
                features,
                position,
                pixel_rows,
                channels,
                features_stride_p,
                features_stride_c,
                position_stride_p,
                position_stride_c,
                pixels,
                width,
                POSITION,
                UPCAST,
            )
            scores = dot(asking, tl.trans(tile), scores)
        else:
            for first in range(0, width, BLOCK_C):
                piece = first + channels
                asked = load_tile(queries, rows, piece, queries_stride_q, queries_stride_c, query_count, width, UPCAST)
                tile = load_located(
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
                scores = dot(asked, tl.trans(tile), scores)
        allowed = scores == scores
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
        scores = tl.where((pixel_rows < pixels)[None, :], scores, -float("inf"))
        kept = _keep_best(kept, scores, allowed, start, pixels, MASK, K, BLOCK_P)
    return kept


@triton.jit
def _select_prototypes_fwd_kernel(
    features,  # [B, P, M * D]
    position,  # [B, P, M * D]
    queries,  # [B, Q, M * D]
    mask,  # [B, Q, P or words or E]
    mask_features,  # [B, P, E]
    keys,  # [B, Q, M, splits * K]
    query_count,
    pixels,
    width,
    mask_width,
    span,
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
    K: tl.constexpr,
    MASK: tl.constexpr,
    POSITION: tl.constexpr,
    RESIDENT: tl.constexpr,
    MASK_RESIDENT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """K best keys of a span of pixels, for a block of queries of one image and head. Grid (splits, B * M, blocks of queries)."""
    split = tl.program_id(0)
    image = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    rows = tl.program_id(2) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    features += image * features_stride_b + head * width * features_stride_c
    position += image * position_stride_b + head * width * position_stride_c
    queries += image * queries_stride_b + head * width * queries_stride_c
    mask += image * mask_stride_b
    mask_features += image * mask_features_stride_b

    asking = 0.0
    if RESIDENT:
        asking = load_tile(queries, rows, tl.arange(0, BLOCK_C), queries_stride_q, queries_stride_c, query_count, width, UPCAST)
    kept = stream_best(
        asking,
        features,
        position,
        queries,
        mask,
        mask_features,
        rows,
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
        K,
        MASK,
        POSITION,
        RESIDENT,
        MASK_RESIDENT,
        BLOCK_Q,
        BLOCK_P,
        BLOCK_C,
        BLOCK_E,
        UPCAST,
    )
    slots = tl.num_programs(0) * K
    places = ((image * query_count + rows) * HEADS + head) * slots + split * K
    tl.store(keys + places[:, None] + tl.arange(0, K)[None, :], kept, mask=(rows < query_count)[:, None])


@triton.jit
def highest_key(keys, places, inside, candidates, below, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr):
    """The highest of the candidates of each row that is lower than `below`, or NOTHING."""
    best = tl.full((BLOCK_R,), NOTHING, tl.int64)
    for first in range(0, candidates, BLOCK_S):
        column = first + tl.arange(0, BLOCK_S)
        here = inside[:, None] & (column < candidates)[None, :]
        key = tl.load(keys + places[:, None] * candidates + column[None, :], mask=here, other=NOTHING)
        best = tl.maximum(best, tl.max(tl.where(key < below[:, None], key, NOTHING), axis=1))
    return best


@triton.jit
def _merge_keys_kernel(
    keys,  # [rows, candidates]
    indices,  # [rows, count]
    scores,  # [rows, count]
    rows,
    candidates,
    count,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The best `count` of the candidates of each row, best first, unpacked. Keys are distinct: each pass takes the next lower one."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    places = row.to(tl.int64)
    previous = tl.full((BLOCK_R,), (1 << 63) - 1, tl.int64)
    first_index = tl.zeros((BLOCK_R,), tl.int64)
    first_allowed = tl.zeros((BLOCK_R,), tl.int64)
    for slot in range(count):
        best = highest_key(keys, places, inside, candidates, previous, BLOCK_R, BLOCK_S)
        allowed = best >> 62
        index = pixel_of(best)
        first_allowed = tl.where(slot == 0, allowed, first_allowed)
        # nothing left, or blocked behind an allowed one
        empty = (best < 0) | (allowed < first_allowed)
        index = tl.where(empty, first_index, index)
        first_index = tl.where(slot == 0, index, first_index)
        score = tl.where(empty, -float("inf"), _score_of(best))
        tl.store(indices + places * count + slot, index, mask=inside)
        tl.store(scores + places * count + slot, score, mask=inside)
        previous = best


BLOCK_Q_OF_MANY = 64
"""Most queries of a program that keeps more than one key of each."""


def config_for(features: Tensor, mask: Mask | None, position: Tensor | None, arch: int) -> Config:
    """The tiles of a call."""
    scope = "plain" if not isinstance(mask, EmbeddingMask) else "embedding" if position is None else "embedding+position"
    return config_of("select_prototypes", arch, features.dtype, scope)


def plan(
    features_BPC: Tensor,
    queries_BQC: Tensor,
    mask: Mask | None,
    position_BPC: Tensor | None,
    *,
    k: int,
    heads: int,
    arch: int,
    splits: int | None = None,
) -> tuple[tuple[Launch, Launch], Tensor, Tensor]:
    """The launches of one call and what they write: indices and scores. Works on `meta` tensors, which is how kernels are compiled
    without a GPU. `splits` overrides the table's, for tests."""
    (batch, pixels, channels), count = features_BPC.shape, queries_BQC.shape[1]
    config = config_for(features_BPC, mask, position_BPC, arch)
    slots = power_of_two(k, 1)
    block_q = block_of(count, config.block_q if slots == 1 else min(config.block_q, BLOCK_Q_OF_MANY))
    blocks_q = -(-count // block_q)
    splits, span = splits_of(pixels, config.block_p, batch * heads * blocks_q, arch, splits)
    keys = queries_BQC.new_empty((batch, count, heads, splits * slots), dtype=torch.int64)
    indices = queries_BQC.new_empty((batch, count, heads, k), dtype=torch.int64)
    scores = features_BPC.new_empty((batch, count, heads, k))
    arguments: dict[str, Any] = {
        **stream_arguments(features_BPC, queries_BQC, mask, position_BPC, config, width=channels // heads, block_q=block_q),
        "keys": keys,
        "span": span,
        "HEADS": heads,
        "K": slots,
    }
    grid = (splits, batch * heads, blocks_q)
    search = Launch(_select_prototypes_fwd_kernel, grid, arguments, config.num_warps, config.num_stages)
    rows = batch * count * heads
    merging = {"keys": keys, "indices": indices, "scores": scores, "rows": rows, "candidates": splits * slots, "count": k}
    merge = Launch(_merge_keys_kernel, (-(-rows // 16),), {**merging, "BLOCK_R": 16, "BLOCK_S": 64}, num_warps=4, num_stages=2)
    return (search, merge), indices, scores


@torch.no_grad()
def select_prototypes(
    features_BPC: Tensor,
    queries_BQC: Tensor,
    mask: Mask | None,
    position_BPC: Tensor | None,
    *,
    k: int,
    heads: int,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See `emca_kernels.select_prototypes`; scores are summed in float32."""
    launches, indices, scores = plan(
        features_BPC, queries_BQC, mask, position_BPC, k=k, heads=heads, arch=architecture(features_BPC.device), splits=splits
    )
    for launch in launches:
        launch.run(features_BPC.device)
    return indices, scores


def variants(arch: int) -> Iterator[tuple[str, tuple[Launch, ...]]]:
    """Name and launches of one call for each branch of the kernels and each entry of the table, on tensors without values."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    cases = [("bf16", mask, 256, 1, 1, 100, "") for mask in MASKS]
    cases += [("fp32", mask, 256, 1, 1, 100, "") for mask in ("none", "bool", "embedding")]
    cases += [("fp16", "bool", 256, 1, 1, 100, ""), ("bf16", "embedding", 512, 1, 1, 100, "")]
    cases += [(dtype, "bool", width, 1, 1, 100, "") for dtype in ("bf16", "fp32") for width in (64, 128)]
    cases += [(dtype, "bool", 256, 8, 1, 100, "") for dtype in ("bf16", "fp32")]
    cases += [("bf16", "none", 256, 1, 16, 100, ""), *(("bf16", "bool", 256, 1, k, 100, "") for k in (2, 4, 8, 16))]
    cases += [("fp32", "bool", 256, 1, 4, 100, "")]
    cases += [("bf16", "bool", 256, 1, 1, count, "") for count in (1, 37)]
    cases += [(dtype, mask, 256, 1, 1, 100, "position") for dtype in ("bf16", "fp32") for mask in ("bool", "embedding")]
    cases += [(dtype, "packed", 256, 1, 1, 100, "pixels contiguous") for dtype in ("bf16", "fp32")]
    for dtype, kind, channels, heads, k, count, extra in cases:
        features = torch.empty(2, 32768, channels, dtype=dtypes[dtype], device="meta")
        position = features[:1].expand_as(features) if extra == "position" else None
        if extra == "pixels contiguous":
            features = features.mT.contiguous().mT
        queries = features.new_empty(2, count, channels)
        launches, *_ = plan(features, queries, example_mask(kind, features, count), position, k=k, heads=heads, arch=arch)
        yield " ".join(filter(None, (dtype, f"mask={kind}", f"C={channels}", f"M={heads}", f"K={k}", f"Q={count}", extra))), launches
