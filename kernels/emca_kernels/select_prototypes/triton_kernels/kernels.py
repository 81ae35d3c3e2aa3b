"""Device code: keys, the loop over pixels, and the merging of keys."""

from __future__ import annotations

import triton
import triton.language as tl

from emca_kernels.triton.tiles import MASK_NONE, asking_of, image_of, load_allowed, load_embedding, load_located, load_scores

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
def _keep_best(keys, scores, allowed, start, pixels, K: tl.constexpr, TILING: tl.constexpr):
    """The K best keys of each query, of those kept so far [Q, K] and of a tile of scores [Q, P]."""
    columns = tl.arange(0, TILING.BLOCK_P)[None, :]
    for _ in tl.static_range(K):
        best = tl.max(scores, axis=1)
        winners = scores == best[:, None]
        if TILING.MASK == MASK_NONE:
            any_allowed = best == best
        else:
            best_allowed = tl.max(tl.where(allowed, scores, -float("inf")), axis=1)
            any_allowed = best_allowed > -float("inf")
            best = tl.where(any_allowed, best_allowed, best)
            winners = (scores == best[:, None]) & (allowed | (any_allowed == 0)[:, None])
        column = tl.min(tl.where(winners, columns, TILING.BLOCK_P), axis=1)
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
def stream_best(asking, image, first_pixel, last_pixel, K: tl.constexpr, TILING: tl.constexpr):
    """The K best keys [BLOCK_Q, K] of one image's pixels from `first_pixel` to before `last_pixel`."""
    pixels = image.features.rows
    embedding = load_embedding(image.mask, asking.rows, TILING)
    # kept keys differ from each other, so that one of them is the worst
    kept = tl.zeros((TILING.BLOCK_Q, K), tl.int64) + (tl.arange(0, K).to(tl.int64) + NOTHING)[None, :]
    for start in range(first_pixel, last_pixel, TILING.BLOCK_P):
        pixel_rows = start + tl.arange(0, TILING.BLOCK_P)
        tile = 0.0
        if TILING.RESIDENT:
            channels = tl.arange(0, TILING.BLOCK_C)
            tile = load_located(image.features, image.position, pixel_rows, channels, TILING.POSITION, TILING.UPCAST)
        scores = load_scores(asking, image, pixel_rows, tile, TILING)
        allowed = scores == scores
        if TILING.MASK != MASK_NONE:
            allowed = load_allowed(image, embedding, asking.rows, start, TILING)
        scores = tl.where((pixel_rows < pixels)[None, :], scores, -float("inf"))
        kept = _keep_best(kept, scores, allowed, start, pixels, K, TILING)
    return kept


@triton.jit
def select_prototypes_fwd_kernel(
    streamed,
    keys,  # [B, Q, M, splits * K]
    span,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    TILING: tl.constexpr,
):
    """K best keys of a span of pixels, for a block of queries of one image and head. Grid (splits, B * M, blocks of queries)."""
    split = tl.program_id(0)
    image = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    rows = tl.program_id(2) * TILING.BLOCK_Q + tl.arange(0, TILING.BLOCK_Q)
    asking = asking_of(streamed, image, rows, head * streamed.width, TILING.RESIDENT, TILING)
    seen = image_of(streamed, image, head * streamed.width)
    last = tl.minimum(split * span + span, streamed.pixels)
    kept = stream_best(asking, seen, split * span, last, K, TILING)
    slots = tl.num_programs(0) * K
    places = ((image * streamed.query_count + rows) * HEADS + head) * slots + split * K
    tl.store(keys + places[:, None] + tl.arange(0, K)[None, :], kept, mask=(rows < streamed.query_count)[:, None])


@triton.jit
def highest_key(keys, places, inside, candidates, below, BLOCK_S: tl.constexpr):
    """The highest of the candidates of each row that is lower than `below`, or NOTHING."""
    best = tl.full((places.shape[0],), NOTHING, tl.int64)
    for first in range(0, candidates, BLOCK_S):
        column = first + tl.arange(0, BLOCK_S)
        here = inside[:, None] & (column < candidates)[None, :]
        key = tl.load(keys + places[:, None] * candidates + column[None, :], mask=here, other=NOTHING)
        best = tl.maximum(best, tl.max(tl.where(key < below[:, None], key, NOTHING), axis=1))
    return best


@triton.jit
def merge_keys_kernel(
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
        best = highest_key(keys, places, inside, candidates, previous, BLOCK_S)
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
