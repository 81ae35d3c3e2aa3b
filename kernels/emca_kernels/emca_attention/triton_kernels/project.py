"""Device code: queries are projected, and folded into the keys. See kernels/README.md."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from emca_kernels.emca_attention.triton_kernels.arguments import MEAN
from emca_kernels.triton.tiles import (
    Matrix,
    contiguous,
    dot,
    load_located,
    load_resident,
    load_tile,
    matrix_of,
    multiply,
    rounded,
    store_tile,
    transposed,
)


class Folding(NamedTuple):
    """Queries of one image on their way to folded ones."""

    queries: Matrix
    """[Q, C]"""
    position: Matrix
    """[Q, C]"""
    query_weight: Matrix
    """[D, C]"""
    query_bias: Any
    """[D]"""
    key_weight: Matrix
    """[D, C]"""
    scale: Any
    """One number."""
    projected: Matrix
    """[Q, D], result"""
    folded: Matrix
    """[Q, C], written where folded queries go through memory."""


@triton.jit
def folding_of(streamed, query_position, projections, scale, found, key_width, image):
    """That of one image; see `arguments` for what it is made of."""
    count, width = streamed.query_count, streamed.width
    return Folding(
        matrix_of(streamed.queries, image, count, width),
        matrix_of(query_position, image, count, width),
        contiguous(projections.query_weight_DC, key_width, width),
        projections.query_bias_D,
        contiguous(projections.key_weight_DC, key_width, width),
        scale,
        contiguous(found.projected + image * count * key_width, count, key_width),
        contiguous(found.folded + image * count * width, count, width),
    )


@triton.jit
def fold_queries(folding, rows, is_first, SEARCHING: tl.constexpr, TILING: tl.constexpr):
    """Writes the projected queries; gives the folded ones [BLOCK_Q, BLOCK_C] if RESIDENT, else they are in `folding.folded`.

    All programs of a block of queries project alike. Where the rows fit on chip, the first of them writes the result; else all write the
    same bits, and each reads what it has written itself.
    """
    tile = 0.0
    if SEARCHING.SELECTION == MEAN:
        if is_first:
            _project(folding, rows, SEARCHING, TILING)
    elif SEARCHING.FOLD_ON_CHIP:
        tile = _project_and_fold(folding, rows, is_first, SEARCHING, TILING)
    else:
        _project(folding, rows, SEARCHING, TILING)
        # a barrier makes what a program wrote visible to all of its threads
        tl.debug_barrier()
        _fold(folding, rows, SEARCHING, TILING)
        tl.debug_barrier()
        tile = load_resident(folding.folded, rows, TILING.BLOCK_C, TILING.RESIDENT, TILING.UPCAST)
    return tile


@triton.jit
def _project_and_fold(folding, rows, is_first, SEARCHING: tl.constexpr, TILING: tl.constexpr):
    """Both on chip, BLOCK_D key channels at a time; each of the two is rounded as torch would."""
    UPCAST: tl.constexpr = TILING.UPCAST
    channels = tl.arange(0, TILING.BLOCK_C)
    located = load_located(folding.queries, folding.position, rows, channels, SEARCHING.QUERY_POSITION, UPCAST)
    key_width = folding.projected.columns
    written = contiguous(folding.projected.base, tl.where(is_first, folding.projected.rows, 0), key_width)
    folded = tl.zeros((TILING.BLOCK_Q, TILING.BLOCK_C), tl.float32)
    for first in range(0, key_width, SEARCHING.BLOCK_D):
        keys = first + tl.arange(0, SEARCHING.BLOCK_D)
        weight = load_tile(folding.query_weight, keys, channels, UPCAST)
        part = dot(located, tl.trans(weight), tl.zeros((TILING.BLOCK_Q, SEARCHING.BLOCK_D), tl.float32))
        part = add_bias(part, folding.query_bias, keys, key_width, folding.queries.base, UPCAST)
        store_tile(written, rows, keys, part)
        folded = dot(part, load_tile(folding.key_weight, keys, channels, UPCAST), folded)
    return _scaled(folded, folding, SEARCHING.SCALED, UPCAST)


@triton.jit
def _project(folding, rows, SEARCHING: tl.constexpr, TILING: tl.constexpr):
    """Writes the projected queries; rows of all channels never meet on chip."""
    UPCAST: tl.constexpr = TILING.UPCAST
    for first in range(0, folding.projected.columns, SEARCHING.BLOCK_D):
        keys = first + tl.arange(0, SEARCHING.BLOCK_D)
        part = tl.zeros((TILING.BLOCK_Q, SEARCHING.BLOCK_D), tl.float32)
        for start in range(0, folding.queries.columns, SEARCHING.BLOCK_X):
            piece = start + tl.arange(0, SEARCHING.BLOCK_X)
            located = load_located(folding.queries, folding.position, rows, piece, SEARCHING.QUERY_POSITION, UPCAST)
            part = dot(located, tl.trans(load_tile(folding.query_weight, keys, piece, UPCAST)), part)
        part = add_bias(part, folding.query_bias, keys, folding.projected.columns, folding.queries.base, UPCAST)
        store_tile(folding.projected, rows, keys, part)


@triton.jit
def _fold(folding, rows, SEARCHING: tl.constexpr, TILING: tl.constexpr):
    """Writes the folded queries from the projected ones."""
    for first in range(0, folding.folded.columns, SEARCHING.BLOCK_X):
        columns = first + tl.arange(0, SEARCHING.BLOCK_X)
        part = multiply(folding.projected, transposed(folding.key_weight), rows, columns, SEARCHING.BLOCK_D, TILING.UPCAST)
        store_tile(folding.folded, rows, columns, _scaled(part, folding, SEARCHING.SCALED, TILING.UPCAST))


@triton.jit
def _scaled(folded, folding, SCALED: tl.constexpr, UPCAST: tl.constexpr):
    asking = rounded(folded, folding.queries.base, UPCAST)
    if SCALED:
        asking = rounded(asking.to(tl.float32) * tl.load(folding.scale).to(tl.float32), folding.queries.base, UPCAST)
    return asking


@triton.jit
def add_bias(values, bias, columns, column_count, like, UPCAST: tl.constexpr):
    """A product's float32 values with the bias of their columns, rounded to the dtype that `like` points to."""
    return rounded(values + tl.load(bias + columns, mask=columns < column_count, other=0.0).to(tl.float32)[None, :], like, UPCAST)
