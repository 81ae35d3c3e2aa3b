"""Device functions that the kernels share: matrices, tiles of them, of masks, and of products.

Triton turns integer arguments that equal 1 into constants, so one source serves channel-contiguous and pixel-contiguous features.
Functions return tuples of tensors alone: a constant in one would come back as a number of run time. So what kernels are compiled for has
tuples of its own (`arguments.Tiling`), which no function returns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

MASK_NONE = tl.constexpr(0)
MASK_BOOL = tl.constexpr(1)
MASK_PACKED = tl.constexpr(2)
MASK_LOGIT = tl.constexpr(3)
MASK_EMBEDDING = tl.constexpr(4)


class Matrix(NamedTuple):
    """One matrix in memory."""

    base: Any
    row_stride: Any
    column_stride: Any
    rows: Any
    columns: Any


class Image(NamedTuple):
    """What queries see of one image, or of one head's channels of it."""

    features: Matrix
    """[P, C]"""
    position: Matrix
    """[P, C]"""
    mask: Matrix
    """[Q, P] bytes, [Q, P / 32] words, [Q, P] logits, or [Q, E] embeddings; `columns` is E, and holds for embeddings alone."""
    mask_features: Matrix
    """[P, E]"""


class Asking(NamedTuple):
    """The queries of a program."""

    rows: Any
    """Which they are, [BLOCK_Q]."""
    queries: Matrix
    """[Q, C]"""
    tile: Any
    """All their channels [BLOCK_Q, BLOCK_C] if RESIDENT; else pieces are loaded from `queries` as they are needed."""


@triton.jit
def matrix_of(batched, image, rows, columns, first_column=0):
    """The matrix of one image, from a column on; see `arguments.Batched`."""
    base = batched.base + (image * batched.image_stride + first_column * batched.column_stride)
    return Matrix(base, batched.row_stride, batched.column_stride, rows, columns)


@triton.jit
def contiguous(base, rows, columns):
    """A matrix without gaps."""
    return Matrix(base, columns, 1, rows, columns)


@triton.jit
def transposed(matrix):
    """The same numbers, rows for columns."""
    return Matrix(matrix.base, matrix.column_stride, matrix.row_stride, matrix.columns, matrix.rows)


@triton.jit
def image_of(streamed, image, first_channel=0):
    """One image of what is streamed; see `arguments.Streamed`."""
    return Image(
        matrix_of(streamed.features, image, streamed.pixels, streamed.width, first_channel),
        matrix_of(streamed.position, image, streamed.pixels, streamed.width, first_channel),
        matrix_of(streamed.mask, image, streamed.query_count, streamed.mask_width),
        matrix_of(streamed.mask_features, image, streamed.pixels, streamed.mask_width),
    )


@triton.jit
def load_tile(matrix, rows, columns, UPCAST: tl.constexpr):
    """Elements [rows, columns] of a matrix, zero beyond its ends. UPCAST: the interpreter multiplies bfloat16 as integers."""
    # added to the base as one: one after the other, as in `_pointers`, two kernels spill with Triton 3.6
    offsets = rows.to(tl.int64)[:, None] * matrix.row_stride + columns.to(tl.int64)[None, :] * matrix.column_stride
    tile = tl.load(matrix.base + offsets, mask=_inside(matrix, rows, columns), other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def store_tile(matrix, rows, columns, values):
    """Write elements [rows, columns] of a matrix, none beyond its ends."""
    tl.store(_pointers(matrix, rows, columns), values, mask=_inside(matrix, rows, columns))


@triton.jit
def _pointers(matrix, rows, columns):
    return matrix.base + rows.to(tl.int64)[:, None] * matrix.row_stride + columns.to(tl.int64)[None, :] * matrix.column_stride


@triton.jit
def _inside(matrix, rows, columns):
    return (rows < matrix.rows)[:, None] & (columns < matrix.columns)[None, :]


@triton.jit
def load_resident(matrix, rows, BLOCK: tl.constexpr, RESIDENT: tl.constexpr, UPCAST: tl.constexpr):
    """All columns of some rows if they stay on chip, else nothing that may be used."""
    tile = 0.0
    if RESIDENT:
        tile = load_tile(matrix, rows, tl.arange(0, BLOCK), UPCAST)
    return tile


@triton.jit
def asking_of(streamed, image, rows, first_channel, LOADED: tl.constexpr, TILING: tl.constexpr):
    """Queries of one image from a channel on, those of `rows` on chip if LOADED."""
    queries = matrix_of(streamed.queries, image, streamed.query_count, streamed.width, first_channel)
    return Asking(rows, queries, load_resident(queries, rows, TILING.BLOCK_C, LOADED, TILING.UPCAST))


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
def load_located(features, position, rows, columns, POSITION: tl.constexpr, UPCAST: tl.constexpr):
    """A tile of the features, with its position added and the sum rounded to the features' dtype, as torch would."""
    tile = load_tile(features, rows, columns, UPCAST)
    if POSITION:
        where = load_tile(position, rows, columns, UPCAST)
        tile = rounded(tile.to(tl.float32) + where.to(tl.float32), features.base, UPCAST)
    return tile


@triton.jit
def dot(a, b, accumulator):
    """accumulator + a b. float32 as three products of tf32 parts: tensor cores, and the right index (see kernels/README.md)."""
    return tl.dot(a, b, accumulator, input_precision="tf32x3")


@triton.jit
def multiply(factors, weight, rows, columns, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr):
    """Rows of a matrix [rows, inner] times rows of a weight [columns, inner], float32, by pieces of BLOCK_K."""
    result = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for first in range(0, factors.columns, BLOCK_K):
        piece = first + tl.arange(0, BLOCK_K)
        factor = load_tile(factors, rows, piece, UPCAST)
        other = load_tile(weight, columns, piece, UPCAST)
        result = dot(factor, tl.trans(other), result)
    return result


@triton.jit
def load_scores(asking, image, pixel_rows, tile, TILING: tl.constexpr):
    """Products [BLOCK_Q, BLOCK_P] of the queries with pixels: with `tile`, which holds all their channels, if RESIDENT, else by pieces."""
    scores = tl.zeros((TILING.BLOCK_Q, TILING.BLOCK_P), tl.float32)
    if TILING.RESIDENT:
        scores = dot(asking.tile, tl.trans(tile), scores)
    else:
        for first in range(0, image.features.columns, TILING.BLOCK_C):
            piece = first + tl.arange(0, TILING.BLOCK_C)
            asked = load_tile(asking.queries, asking.rows, piece, TILING.UPCAST)
            part = load_located(image.features, image.position, pixel_rows, piece, TILING.POSITION, TILING.UPCAST)
            scores = dot(asked, tl.trans(part), scores)
    return scores


@triton.jit
def load_embedding(mask, rows, TILING: tl.constexpr):
    """The mask embeddings of queries, where they stay on chip."""
    return load_resident(mask, rows, TILING.BLOCK_E, TILING.MASK == MASK_EMBEDDING and TILING.MASK_RESIDENT, TILING.UPCAST)


@triton.jit
def load_allowed(image, embedding, rows, start, TILING: tl.constexpr):
    """Bool [BLOCK_Q, BLOCK_P]: where the queries `rows` may look among the pixels from `start`; False beyond the ends.

    `embedding` is what `load_embedding` gave.
    """
    mask = image.mask
    pixels = image.mask_features.rows
    pixel_rows = start + tl.arange(0, TILING.BLOCK_P)
    inside = (rows < mask.rows)[:, None] & (pixel_rows < pixels)[None, :]
    if TILING.MASK == MASK_BOOL:
        allowed = tl.load(_pointers(mask, rows, pixel_rows), mask=inside, other=0) != 0
    elif TILING.MASK == MASK_PACKED:
        # one load per 32 pixels, spread by a reshape: a gather of words per element spills
        words_at = start // 32 + tl.arange(0, TILING.BLOCK_P // 32)
        words_inside = (rows < mask.rows)[:, None] & (words_at * 32 < pixels)[None, :]
        words = tl.load(_pointers(mask, rows, words_at), mask=words_inside, other=0)
        bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
        allowed = (tl.reshape(bits, (TILING.BLOCK_Q, TILING.BLOCK_P)) != 0) & inside
    elif TILING.MASK == MASK_LOGIT:
        logits = tl.load(_pointers(mask, rows, pixel_rows), mask=inside, other=-1.0)
        allowed = logits.to(tl.float32) >= 0
    else:
        allowed = (_mask_logits(image, embedding, rows, pixel_rows, TILING) >= 0) & inside
    return allowed


@triton.jit
def _mask_logits(image, embedding, rows, pixel_rows, TILING: tl.constexpr):
    """Products [BLOCK_Q, BLOCK_P] of mask embeddings with the mask features of pixels."""
    logits = tl.zeros((TILING.BLOCK_Q, TILING.BLOCK_P), tl.float32)
    if TILING.MASK_RESIDENT:
        tile = load_tile(image.mask_features, pixel_rows, tl.arange(0, TILING.BLOCK_E), TILING.UPCAST)
        logits = dot(embedding, tl.trans(tile), logits)
    else:
        for first in range(0, image.mask.columns, TILING.BLOCK_E):
            columns = first + tl.arange(0, TILING.BLOCK_E)
            asked = load_tile(image.mask, rows, columns, TILING.UPCAST)
            tile = load_tile(image.mask_features, pixel_rows, columns, TILING.UPCAST)
            logits = dot(asked, tl.trans(tile), logits)
    return logits
