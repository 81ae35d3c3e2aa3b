"""The first launch: queries are projected and folded, then pixels stream past them."""

from __future__ import annotations

import triton
import triton.language as tl

from emca_kernels.emca_attention.triton_kernels.arguments import ARGMAX, SOFTMAX
from emca_kernels.emca_attention.triton_kernels.project import fold_queries, folding_of
from emca_kernels.pool_prototypes.triton_kernels.kernels import store_sums, stream_sums
from emca_kernels.select_prototypes.triton_kernels.kernels import stream_best
from emca_kernels.triton.tiles import Asking, image_of


@triton.jit
def emca_attention_fwd_kernel(
    streamed,
    query_position,  # [B, Q, C]
    projections,
    scale,  # one number
    found,
    key_width,
    span,
    SEARCHING: tl.constexpr,
    TILING: tl.constexpr,
):
    """Keys or sums of a span of pixels, for a block of queries. Grid (splits, B, blocks of channels * blocks of queries)."""
    split = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(2) % SEARCHING.BLOCKS_Q) * TILING.BLOCK_Q + tl.arange(0, TILING.BLOCK_Q)
    block_v = tl.program_id(2) // SEARCHING.BLOCKS_Q
    folding = folding_of(streamed, query_position, projections, scale, found, key_width, image)
    tile = fold_queries(folding, rows, (split == 0) & (block_v == 0), SEARCHING, TILING)
    asking = Asking(rows, folding.folded, tile)
    seen = image_of(streamed, image)
    last = tl.minimum(split * span + span, streamed.pixels)
    inside = rows < streamed.query_count
    places = image * streamed.query_count + rows
    if SEARCHING.SELECTION == ARGMAX:
        kept = stream_best(asking, seen, split * span, last, 1, TILING)
        slots = places[:, None] * tl.num_programs(0) + split + tl.arange(0, 1)[None, :]
        tl.store(found.keys + slots, kept, mask=inside[:, None])
    else:
        values = block_v * SEARCHING.BLOCK_V + tl.arange(0, SEARCHING.BLOCK_V)
        sums = stream_sums(asking, seen, values, split * span, last, SEARCHING.SELECTION == SOFTMAX, TILING)
        store_sums(found.parts, split, places, inside, values, sums, block_v == 0)
