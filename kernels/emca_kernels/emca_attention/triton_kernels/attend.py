"""The second launch: spans are merged, and each query attends to its prototype."""

from __future__ import annotations

import triton
import triton.language as tl

from emca_kernels.emca_attention.triton_kernels.arguments import ARGMAX, SOFTMAX
from emca_kernels.emca_attention.triton_kernels.project import add_bias
from emca_kernels.pool_prototypes.triton_kernels.kernels import merge_sums
from emca_kernels.select_prototypes.triton_kernels.kernels import highest_key, pixel_of
from emca_kernels.triton.tiles import contiguous, load_tile, multiply, rounded, store_tile


@triton.jit
def emca_attention_merge_kernel(
    streamed,
    found,
    projections,
    attended,  # results; see emca_attention.arguments
    scratch,  # [2, rows, D]
    key_width,
    splits,
    ATTENDING: tl.constexpr,
):
    """Merge, gather, key, product, norm, out, residual, for a few queries of all images, all their channels at once.

    What one product leaves, the next reads by pieces: through memory, where no other program looks, and barriers.
    """
    UPCAST: tl.constexpr = ATTENDING.UPCAST
    like = streamed.features.base
    count, width = found.parts.rows, found.parts.width
    row = tl.program_id(0) * ATTENDING.BLOCK_R + tl.arange(0, ATTENDING.BLOCK_R)
    channels = tl.arange(0, ATTENDING.BLOCK_C)
    keyed = tl.arange(0, ATTENDING.BLOCK_D)
    prototypes = contiguous(attended.rows_BQC, count, width)
    gathered = _gather(streamed, found, attended.kept_BQ, splits, row, channels, ATTENDING)
    store_tile(prototypes, row, channels, rounded(gathered, like, UPCAST))
    tl.debug_barrier()

    key = _linear(prototypes, projections.key_weight_DC, projections.key_bias_D, row, keyed, key_width, ATTENDING)
    projected = contiguous(found.projected, count, key_width)
    asked = load_tile(projected, row, keyed, UPCAST).to(tl.float32)
    products = contiguous(scratch, count, key_width)
    store_tile(products, row, keyed, rounded(asked * key, like, UPCAST))
    tl.debug_barrier()

    product = _linear(products, projections.product_weight_DD, projections.product_bias_D, row, keyed, key_width, ATTENDING)
    norm = tl.maximum(tl.sqrt(tl.sum(product * product, axis=1)), ATTENDING.SMALLEST)
    alpha = tl.load(projections.alpha_D + keyed, mask=keyed < key_width, other=0.0).to(tl.float32)
    mixed = contiguous(scratch + tl.cast(count, tl.int64) * key_width, count, key_width)
    store_tile(mixed, row, keyed, rounded(alpha[None, :] * (product / norm[:, None]) + key, like, UPCAST))
    tl.debug_barrier()

    out = _linear(mixed, projections.out_weight_CD, projections.out_bias_C, row, channels, width, ATTENDING)
    if ATTENDING.PROJECTED_RESIDUAL:
        kept = load_tile(projected, row, channels, UPCAST)
    else:
        kept = _load_rows(streamed.queries, row // streamed.query_count, row % streamed.query_count, channels, found.parts, row)
    store_tile(contiguous(attended.queries_BQC, count, width), row, channels, rounded(out + kept.to(tl.float32), like, UPCAST))


@triton.jit
def _gather(streamed, found, kept, splits, row, channels, ATTENDING: tl.constexpr):
    """Prototypes as float32 features [BLOCK_R, BLOCK_C]: chosen pixels with their position, or means. Writes what is kept of the choice."""
    inside = row < found.parts.rows
    if ATTENDING.SELECTION == ARGMAX:
        above = tl.full((ATTENDING.BLOCK_R,), (1 << 63) - 1, tl.int64)
        best = highest_key(found.keys, row.to(tl.int64), inside, splits, above, ATTENDING.BLOCK_S)
        pixel = tl.where(inside, pixel_of(best), 0)
        tl.store(kept + row, pixel, mask=inside)
        image = row // streamed.query_count
        gathered = _load_rows(streamed.features, image, pixel, channels, found.parts, row).to(tl.float32)
        if ATTENDING.POSITION:
            gathered += _load_rows(streamed.position, image, pixel, channels, found.parts, row).to(tl.float32)
    else:
        gathered, normaliser = merge_sums(found.parts, splits, row, inside, channels)
        tl.store(kept + row, normaliser if ATTENDING.SELECTION == SOFTMAX else tl.zeros((ATTENDING.BLOCK_R,), tl.float32), mask=inside)
    return gathered


@triton.jit
def _load_rows(batched, image, place, channels, parts, row):
    """For each result row, the row `place` of its image's matrix; zero beyond the ends of the result."""
    at = image.to(tl.int64) * batched.image_stride + place.to(tl.int64) * batched.row_stride
    inside = (row < parts.rows)[:, None] & (channels < parts.width)[None, :]
    return tl.load(batched.base + at[:, None] + channels[None, :] * batched.column_stride, mask=inside, other=0.0)


@triton.jit
def _linear(factors, weight, bias, row, columns, column_count, ATTENDING: tl.constexpr):
    """Rows times a weight [column_count, inner], with its bias: rounded as torch would, then float32."""
    weight = contiguous(weight, column_count, factors.columns)
    product = multiply(factors, weight, row, columns, ATTENDING.BLOCK_K, ATTENDING.UPCAST)
    return add_bias(product, bias, columns, column_count, factors.base, ATTENDING.UPCAST).to(tl.float32)
