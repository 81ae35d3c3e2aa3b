"""Device functions that the kernels share: tiles of matrices, of masks, and of products.

Triton turns integer arguments that equal 1 into constants, so one source serves channel-contiguous and pixel-contiguous features.
"""

from __future__ import annotations

import triton
import triton.language as tl

MASK_NONE = tl.constexpr(0)
MASK_BOOL = tl.constexpr(1)
MASK_PACKED = tl.constexpr(2)
MASK_LOGIT = tl.constexpr(3)
MASK_EMBEDDING = tl.constexpr(4)


@triton.jit
def load_tile(base, rows, columns, row_stride, column_stride, row_count, column_count, UPCAST: tl.constexpr):
    """Elements [rows, columns] of a matrix, zero beyond its ends. UPCAST: the interpreter multiplies bfloat16 as integers."""
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    tile = tl.load(base + offsets, mask=inside, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def rounded(values, like, UPCAST: tl.constexpr):
    """float32 values rounded to the dtype that `like` points to, as a factor of a product of tiles; to nearest in the interpreter too."""
    if UPCAST:
        if like.dtype.element_ty == tl.bfloat16:
            # the interpreter cuts bits off
            bits = values.to(tl.int32, bitcast=True)
            values = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        factor = values.to(like.dtype.element_ty).to(tl.float32)
    else:
        factor = values.to(like.dtype.element_ty)
    return factor


@triton.jit
def load_located(
    features,
    position,
    rows,
    columns,
    row_stride,
    column_stride,
    position_row_stride,
    position_column_stride,
    row_count,
    column_count,
    POSITION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile of the features, with its position added and the sum rounded to the features' dtype, as torch would."""
    tile = load_tile(features, rows, columns, row_stride, column_stride, row_count, column_count, UPCAST)
    if POSITION:
        where = load_tile(position, rows, columns, position_row_stride, position_column_stride, row_count, column_count, UPCAST)
        tile = rounded(tile.to(tl.float32) + where.to(tl.float32), features, UPCAST)
    return tile


@triton.jit
def dot(a, b, accumulator):
    """accumulator + a b. float32 as three products of tf32 parts: tensor cores, and the right index (see kernels/README.md)."""
    return tl.dot(a, b, accumulator, input_precision="tf32x3")


@triton.jit
def multiply(
    factors, weight, rows, columns, factors_stride, weight_stride, inner_stride, row_count, column_count, inner, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows of a matrix [rows, inner] times a weight [columns, inner], float32 [BLOCK_R, BLOCK_N], by pieces of BLOCK_K."""
    result = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for first in range(0, inner, BLOCK_K):
        piece = first + tl.arange(0, BLOCK_K)
        factor = load_tile(factors, rows, piece, factors_stride, 1, row_count, inner, UPCAST)
        other = load_tile(weight, columns, piece, weight_stride, inner_stride, column_count, inner, UPCAST)
        result = dot(factor, tl.trans(other), result)
    return result


@triton.jit
def load_allowed(
    mask,
    embedding,
    mask_features,
    query_rows,
    start,
    query_stride,
    pixel_stride,
    embedding_row_stride,
    embedding_column_stride,
    query_count,
    pixels,
    embedding_width,
    MASK: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
    EMBEDDING_RESIDENT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Bool [BLOCK_Q, BLOCK_P]: where queries may look among the pixels from `start`; False beyond the ends.

    `mask` is [Q, P] bytes, [Q, P / 32] words or [Q, P] logits; for an embedding mask it is the embedding [Q, E], of which `embedding`
    is the tile already loaded if it is resident, and `mask_features` is [P, E].
    """
    pixel_rows = start + tl.arange(0, BLOCK_P)
    inside = (query_rows < query_count)[:, None] & (pixel_rows < pixels)[None, :]
    queries_at = query_rows.to(tl.int64)[:, None] * query_stride
    if MASK == MASK_BOOL:
        allowed = tl.load(mask + queries_at + pixel_rows.to(tl.int64)[None, :] * pixel_stride, mask=inside, other=0) != 0
    elif MASK == MASK_PACKED:
        # one load per 32 pixels, spread by a reshape: a gather of words per element spills
        words_at = start // 32 + tl.arange(0, BLOCK_P // 32)
        words_inside = (query_rows < query_count)[:, None] & (words_at * 32 < pixels)[None, :]
        words = tl.load(mask + queries_at + words_at.to(tl.int64)[None, :] * pixel_stride, mask=words_inside, other=0)
        bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        allowed = (tl.reshape(bits, (BLOCK_Q, BLOCK_P)) != 0) & inside
    elif MASK == MASK_LOGIT:
        logits = tl.load(mask + queries_at + pixel_rows.to(tl.int64)[None, :] * pixel_stride, mask=inside, other=-1.0)
        allowed = logits.to(tl.float32) >= 0
    else:
        logits = tl.zeros((BLOCK_Q, BLOCK_P), tl.float32)
        if EMBEDDING_RESIDENT:
            columns = tl.arange(0, BLOCK_E)
            tile = load_tile(
                mask_features, pixel_rows, columns, embedding_row_stride, embedding_column_stride, pixels, embedding_width, UPCAST
            )
            logits = dot(embedding, tl.trans(tile), logits)
        else:
            for first in range(0, embedding_width, BLOCK_E):
                columns = first + tl.arange(0, BLOCK_E)
                asked = load_tile(mask, query_rows, columns, query_stride, pixel_stride, query_count, embedding_width, UPCAST)
                tile = load_tile(
                    mask_features, pixel_rows, columns, embedding_row_stride, embedding_column_stride, pixels, embedding_width, UPCAST
                )
                logits = dot(asked, tl.trans(tile), logits)
        allowed = (logits >= 0) & inside
    return allowed
