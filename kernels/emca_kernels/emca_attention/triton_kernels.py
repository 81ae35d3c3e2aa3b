"""The whole layer on GPUs in two launches.

The first projects and folds its block of queries, then streams its span of pixels past them with the loops of selection and soft
prototypes. The second merges the spans, and carries each query's one row through the rest of the layer. See kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from emca_kernels.attend_prototypes.reference import smallest_norm
from emca_kernels.emca_attention.arguments import Attended, Projections
from emca_kernels.masks import Mask
from emca_kernels.pool_prototypes import triton_kernels as pooling
from emca_kernels.pool_prototypes.triton_kernels import merge_sums, store_sums, stream_sums
from emca_kernels.select_prototypes import triton_kernels as selecting
from emca_kernels.select_prototypes.triton_kernels import highest_key, pixel_of, stream_best
from emca_kernels.triton.arguments import MASKS, example_mask, matrix_arguments, stream_arguments
from emca_kernels.triton.configs import block_of, power_of_two, splits_of
from emca_kernels.triton.runtime import Launch, architecture
from emca_kernels.triton.tiles import dot, load_located, load_tile, multiply, rounded

ARGMAX = tl.constexpr(0)
SOFTMAX = tl.constexpr(1)
MEAN = tl.constexpr(2)


@triton.jit
def _project_and_fold(
    queries,
    query_position,
    query_weight,
    query_bias,
    key_weight,
    scale,
    projected,
    rows,
    queries_stride_q,
    queries_stride_c,
    query_position_stride_q,
    query_position_stride_c,
    query_count,
    width,
    key_width,
    rows_written,
    QUERY_POSITION: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Folded queries [BLOCK_Q, BLOCK_C], projected BLOCK_D key channels at a time; each of the two is rounded as torch would."""
    channels = tl.arange(0, BLOCK_C)
    located = load_located(
        queries,
        query_position,
        rows,
        channels,
        queries_stride_q,
        queries_stride_c,
        query_position_stride_q,
        query_position_stride_c,
        query_count,
        width,
        QUERY_POSITION,
        UPCAST,
    )
    folded = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    for first in range(0, key_width, BLOCK_D):
        keys = first + tl.arange(0, BLOCK_D)
        weight = load_tile(query_weight, keys, channels, width, 1, key_width, width, UPCAST)
        part = dot(located, tl.trans(weight), tl.zeros((BLOCK_Q, BLOCK_D), tl.float32))
        part = _with_bias(part, query_bias, keys, key_width, queries, UPCAST)
        _store(projected, part, rows, keys, rows_written, key_width)
        weight = load_tile(key_weight, keys, channels, width, 1, key_width, width, UPCAST)
        folded = dot(part, weight, folded)
    asking = rounded(folded, queries, UPCAST)
    if SCALED:
        asking = rounded(asking.to(tl.float32) * tl.load(scale).to(tl.float32), queries, UPCAST)
    return asking


@triton.jit
def _project_by_pieces(
    queries,
    query_position,
    query_weight,
    query_bias,
    projected,
    rows,
    queries_stride_q,
    queries_stride_c,
    query_position_stride_q,
    query_position_stride_c,
    query_count,
    width,
    key_width,
    QUERY_POSITION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Writes the projected queries; rows of all channels never meet on chip."""
    for first in range(0, key_width, BLOCK_D):
        keys = first + tl.arange(0, BLOCK_D)
        part = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
        for start in range(0, width, BLOCK_C):
            piece = start + tl.arange(0, BLOCK_C)
            located = load_located(
                queries,
                query_position,
                rows,
                piece,
                queries_stride_q,
                queries_stride_c,
                query_position_stride_q,
                query_position_stride_c,
                query_count,
                width,
                QUERY_POSITION,
                UPCAST,
            )
            weight = load_tile(query_weight, keys, piece, width, 1, key_width, width, UPCAST)
            part = dot(located, tl.trans(weight), part)
        _store(projected, _with_bias(part, query_bias, keys, key_width, queries, UPCAST), rows, keys, query_count, key_width)


@triton.jit
def _fold_by_pieces(
    projected,
    key_weight,
    scale,
    folded,
    rows,
    query_count,
    width,
    key_width,
    SCALED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Writes the folded queries from the projected ones."""
    for first in range(0, width, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        part = multiply(
            projected, key_weight, rows, columns, key_width, 1, width, query_count, width, key_width, BLOCK_Q, BLOCK_C, BLOCK_D, UPCAST
        )
        asking = rounded(part, projected, UPCAST)
        if SCALED:
            asking = rounded(asking.to(tl.float32) * tl.load(scale).to(tl.float32), projected, UPCAST)
        _store(folded, asking, rows, columns, query_count, width)


@triton.jit
def _with_bias(values, bias, columns, column_count, like, UPCAST: tl.constexpr):
    return rounded(values + tl.load(bias + columns, mask=columns < column_count, other=0.0).to(tl.float32)[None, :], like, UPCAST)


@triton.jit
def _store(base, values, rows, columns, row_count, column_count):
    """Into a contiguous matrix [row_count, column_count]."""
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    tl.store(base + rows.to(tl.int64)[:, None] * column_count + columns[None, :], values, mask=inside)


@triton.jit
def _emca_attention_fwd_kernel(
    features,  # [B, P, C]
    position,  # [B, P, C]
    queries,  # [B, Q, C]
    query_position,  # [B, Q, C]
    mask,  # [B, Q, P or words or E]
    mask_features,  # [B, P, E]
    query_weight,  # [D, C]
    query_bias,  # [D]
    key_weight,  # [D, C]
    scale,  # one number
    projected,  # [B, Q, D] result
    folded,  # [B, Q, C] scratch, where the folded queries go through memory
    keys,  # [B, Q, splits] result of argmax
    sums,  # [splits, B, Q, C] result of the others
    statistics,  # [splits, 3, B, Q]
    query_count,
    pixels,
    width,
    key_width,
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
    query_position_stride_b,
    query_position_stride_q,
    query_position_stride_c,
    mask_stride_b,
    mask_stride_q,
    mask_stride_p,
    mask_features_stride_b,
    mask_features_stride_p,
    mask_features_stride_e,
    SELECTION: tl.constexpr,
    SCALED: tl.constexpr,
    MASK: tl.constexpr,
    POSITION: tl.constexpr,
    QUERY_POSITION: tl.constexpr,
    RESIDENT: tl.constexpr,
    FOLD_ON_CHIP: tl.constexpr,
    MASK_RESIDENT: tl.constexpr,
    BLOCKS_Q: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Keys or sums of a span of pixels, for a block of queries that is projected here. Grid (splits, B, blocks of channels * of queries).

    All programs of a block of queries project alike. Where the rows fit on chip, one of them writes the result; else all write the same
    bits, and each reads what it has written itself.
    """
    split = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(2) % BLOCKS_Q) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    block_v = tl.program_id(2) // BLOCKS_Q
    features += image * features_stride_b
    position += image * position_stride_b
    queries += image * queries_stride_b
    query_position += image * query_position_stride_b
    mask += image * mask_stride_b
    mask_features += image * mask_features_stride_b
    projected += image * query_count * key_width
    folded += image * query_count * width

    asking = 0.0
    is_first = (split == 0) & (block_v == 0)
    if SELECTION == MEAN:
        if is_first:
            _project_by_pieces(
                queries,
                query_position,
                query_weight,
                query_bias,
                projected,
                rows,
                queries_stride_q,
                queries_stride_c,
                query_position_stride_q,
                query_position_stride_c,
                query_count,
                width,
                key_width,
                QUERY_POSITION,
                BLOCK_Q,
                BLOCK_X,
                BLOCK_D,
                UPCAST,
            )
    elif FOLD_ON_CHIP:
        asking = _project_and_fold(
            queries,
            query_position,
            query_weight,
            query_bias,
            key_weight,
            scale,
            projected,
            rows,
            queries_stride_q,
            queries_stride_c,
            query_position_stride_q,
            query_position_stride_c,
            query_count,
            width,
            key_width,
            tl.where(is_first, query_count, 0),
            QUERY_POSITION,
            SCALED,
            BLOCK_Q,
            BLOCK_C,
            BLOCK_D,
            UPCAST,
        )
    else:
        _project_by_pieces(
            queries,
            query_position,
            query_weight,
            query_bias,
            projected,
            rows,
            queries_stride_q,
            queries_stride_c,
            query_position_stride_q,
            query_position_stride_c,
            query_count,
            width,
            key_width,
            QUERY_POSITION,
            BLOCK_Q,
            BLOCK_X,
            BLOCK_D,
            UPCAST,
        )
        # a barrier makes what a program wrote visible to all of its threads
        tl.debug_barrier()
        _fold_by_pieces(
            projected, key_weight, scale, folded, rows, query_count, width, key_width, SCALED, BLOCK_Q, BLOCK_X, BLOCK_D, UPCAST
        )
        tl.debug_barrier()
        if RESIDENT:
            asking = load_tile(folded, rows, tl.arange(0, BLOCK_C), width, 1, query_count, width, UPCAST)
    last = tl.minimum(split * span + span, pixels)
    places = image * query_count + rows
    if SELECTION == ARGMAX:
        kept = stream_best(
            asking,
            features,
            position,
            folded,
            mask,
            mask_features,
            rows,
            split * span,
            last,
            query_count,
            pixels,
            width,
            mask_width,
            features_stride_p,
            features_stride_c,
            position_stride_p,
            position_stride_c,
            width,
            1,
            mask_stride_q,
            mask_stride_p,
            mask_features_stride_p,
            mask_features_stride_e,
            1,
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
        slots = places[:, None] * tl.num_programs(0) + split + tl.arange(0, 1)[None, :]
        tl.store(keys + slots, kept, mask=(rows < query_count)[:, None])
    else:
        values = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
        pooled, top, total, masked = stream_sums(
            asking,
            features,
            position,
            folded,
            mask,
            mask_features,
            rows,
            values,
            split * span,
            last,
            query_count,
            pixels,
            width,
            mask_width,
            features_stride_p,
            features_stride_c,
            position_stride_p,
            position_stride_c,
            width,
            1,
            mask_stride_q,
            mask_stride_p,
            mask_features_stride_p,
            mask_features_stride_e,
            SELECTION == SOFTMAX,
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
        store_sums(
            sums, statistics, places, values, pooled, top, total, masked, rows < query_count, split, rows_of_split, width, block_v == 0
        )


@triton.jit
def _emca_attention_merge_kernel(
    features,  # [B, P, C]
    position,  # [B, P, C]
    queries,  # [B, Q, C]
    projected,  # [rows, D]
    keys,  # [rows, splits]
    sums,  # [splits, rows, C]
    statistics,  # [splits, 3, rows]
    key_weight,  # [D, C]
    key_bias,  # [D]
    product_weight,  # [D, D]
    product_bias,  # [D]
    alpha,  # [D]
    out_weight,  # [C, D]
    out_bias,  # [C]
    updated,  # [rows, C] result
    prototypes,  # [rows, C] result: rows of the features
    kept,  # [rows] result
    scratch,  # [2, rows, D]
    row_count,
    query_count,
    width,
    key_width,
    splits,
    features_stride_b,
    features_stride_p,
    features_stride_c,
    position_stride_b,
    position_stride_p,
    position_stride_c,
    queries_stride_b,
    queries_stride_q,
    queries_stride_c,
    SELECTION: tl.constexpr,
    POSITION: tl.constexpr,
    PROJECTED_RESIDUAL: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Merge, gather, key, product, norm, out, residual, for a few queries of all images, all their channels at once.

    What one product leaves, the next reads by pieces: through memory, where no other program looks, and barriers.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < row_count
    image = (row // query_count).to(tl.int64)
    channels = tl.arange(0, BLOCK_C)
    here = inside[:, None] & (channels < width)[None, :]
    if SELECTION == ARGMAX:
        above = tl.full((BLOCK_R,), (1 << 63) - 1, tl.int64)
        pixel = tl.where(inside, pixel_of(highest_key(keys, row.to(tl.int64), inside, splits, above, BLOCK_R, BLOCK_S)), 0)
        tl.store(kept + row, pixel, mask=inside)
        found = features + (image * features_stride_b + pixel * features_stride_p)[:, None] + channels[None, :] * features_stride_c
        gathered = tl.load(found, mask=here, other=0.0).to(tl.float32)
        if POSITION:
            found = position + (image * position_stride_b + pixel * position_stride_p)[:, None] + channels[None, :] * position_stride_c
            gathered += tl.load(found, mask=here, other=0.0).to(tl.float32)
    else:
        gathered, normaliser = merge_sums(sums, statistics, row, channels, inside, row_count, width, splits, BLOCK_R, BLOCK_C)
        tl.store(kept + row, normaliser if SELECTION == SOFTMAX else tl.zeros((BLOCK_R,), tl.float32), mask=inside)
    _store(prototypes, rounded(gathered, features, UPCAST), row, channels, row_count, width)
    tl.debug_barrier()

    keyed = tl.arange(0, BLOCK_D)
    key = multiply(prototypes, key_weight, row, keyed, width, width, 1, row_count, key_width, width, BLOCK_R, BLOCK_D, BLOCK_K, UPCAST)
    key = _with_bias(key, key_bias, keyed, key_width, features, UPCAST).to(tl.float32)
    asked = load_tile(projected, row, keyed, key_width, 1, row_count, key_width, UPCAST).to(tl.float32)
    _store(scratch, rounded(asked * key, features, UPCAST), row, keyed, row_count, key_width)
    tl.debug_barrier()

    product = multiply(
        scratch, product_weight, row, keyed, key_width, key_width, 1, row_count, key_width, key_width, BLOCK_R, BLOCK_D, BLOCK_K, UPCAST
    )
    product = _with_bias(product, product_bias, keyed, key_width, features, UPCAST).to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(product * product, axis=1)), SMALLEST)
    weight = tl.load(alpha + keyed, mask=keyed < key_width, other=0.0).to(tl.float32)
    mixed = rounded(weight[None, :] * (product / norm[:, None]) + key, features, UPCAST)
    scratch += tl.cast(row_count, tl.int64) * key_width
    _store(scratch, mixed, row, keyed, row_count, key_width)
    tl.debug_barrier()

    out = multiply(
        scratch, out_weight, row, channels, key_width, key_width, 1, row_count, width, key_width, BLOCK_R, BLOCK_C, BLOCK_K, UPCAST
    )
    out = _with_bias(out, out_bias, channels, width, features, UPCAST).to(tl.float32)
    if PROJECTED_RESIDUAL:
        kept_query = load_tile(projected, row, channels, width, 1, row_count, width, UPCAST)
    else:
        queries_at = image * queries_stride_b + (row % query_count).to(tl.int64) * queries_stride_q
        kept_query = tl.load(queries + queries_at[:, None] + channels[None, :] * queries_stride_c, mask=here, other=0.0)
    _store(updated, rounded(out + kept_query.to(tl.float32), features, UPCAST), row, channels, row_count, width)


MERGED_ROWS = 16
PIECES = {(90, "half"): 64, (90, "float"): 32, (80, "half"): 64, (80, "float"): 32}
KEYS = {(90, "half"): 32, (90, "float"): 16, (80, "half"): 32, (80, "float"): 32}
"""Channels of a product's pieces in the second launch, and key channels of a projection's in the first."""


def plan(
    features_BPC: Tensor,
    queries_BQC: Tensor,
    mask: Mask | None,
    position_BPC: Tensor | None,
    query_position_BQC: Tensor | None,
    projections: Projections,
    scale: Tensor | None,
    *,
    selection: str,
    residual: str,
    arch: int,
    splits: int | None = None,
) -> tuple[tuple[Launch, Launch], Attended]:
    """The launches of one call and what they write. See `select_prototypes.triton_kernels.plan`."""
    (batch, pixels, width), count, keys_width = features_BPC.shape, queries_BQC.shape[1], len(projections.query_bias_D)
    weights = Projections(*(parameter.contiguous() for parameter in projections))
    chooses = selection == "argmax"
    if chooses:
        config = selecting.config_for(features_BPC, mask, position_BPC, arch)
    else:
        config = pooling.config_for(features_BPC, width, mask, position_BPC, arch)
    kind = "float" if features_BPC.dtype == torch.float32 else "half"
    piece = PIECES[arch, kind]
    block_q = block_of(count, config.block_q)
    blocks_q = -(-count // block_q)
    block_v = power_of_two(width) if chooses else pooling.values_of(features_BPC, width)
    blocks_v = -(-width // block_v)
    splits, span = splits_of(pixels, config.block_p, batch * blocks_q * blocks_v, arch, splits, per_processor=1)
    rows = batch * count
    streaming = stream_arguments(features_BPC, queries_BQC, mask, position_BPC, config, width=width, block_q=block_q)
    projected = queries_BQC.new_empty((batch, count, keys_width))
    # products of float32 parts, and sums of softmax, need the registers that the folded rows would fill
    fold_on_chip = streaming["RESIDENT"] and kind == "half" and chooses
    folded = queries_BQC if fold_on_chip or selection == "mean" else queries_BQC.new_empty((batch, count, width))
    keys = queries_BQC.new_empty((batch, count, splits), dtype=torch.int64) if chooses else queries_BQC
    sums = queries_BQC if chooses else queries_BQC.new_empty((splits, batch, count, width), dtype=torch.float32)
    statistics = queries_BQC if chooses else queries_BQC.new_empty((splits, 3, batch, count), dtype=torch.float32)
    shared: dict[str, Any] = {
        "projected": projected,
        "keys": keys,
        "sums": sums,
        "statistics": statistics,
        "key_weight": weights.key_weight_DC,
        "key_width": keys_width,
        "SELECTION": ("argmax", "softmax", "mean").index(selection),
    }
    searching = {
        **streaming,
        **shared,
        **matrix_arguments("query_position", query_position_BQC, "bqc", instead=queries_BQC),
        "query_weight": weights.query_weight_DC,
        "query_bias": weights.query_bias_D,
        "scale": queries_BQC if scale is None else scale,
        "folded": folded,
        "span": span,
        "rows_of_split": rows,
        "SCALED": scale is not None,
        "QUERY_POSITION": query_position_BQC is not None,
        "FOLD_ON_CHIP": fold_on_chip,
        "BLOCKS_Q": blocks_q,
        "BLOCK_X": min(config.piece, power_of_two(width)),
        "BLOCK_D": min(KEYS[arch, kind], power_of_two(keys_width)),
        "BLOCK_V": block_v,
    }
    attended = Attended(
        queries_BQC.new_empty((batch, count, width)),
        queries_BQC.new_empty((batch, count, width)),
        queries_BQC.new_empty((batch, count), dtype=torch.int64 if chooses else torch.float32),
    )
    merging = {
        **{name: value for name, value in streaming.items() if name.startswith(("features", "position", "queries", "POSITION", "UPCAST"))},
        **shared,
        **{name.rsplit("_", 1)[0]: value for name, value in weights._asdict().items() if not name.startswith("query")},
        "updated": attended.queries_BQC,
        "prototypes": attended.rows_BQC,
        "kept": attended.kept_BQ,
        "scratch": queries_BQC.new_empty((2, batch, count, keys_width)),
        "row_count": rows,
        "query_count": count,
        "width": width,
        "splits": splits,
        "SMALLEST": smallest_norm(features_BPC.dtype),
        "PROJECTED_RESIDUAL": residual == "projected",
        "BLOCK_R": MERGED_ROWS,
        "BLOCK_S": 32,
        "BLOCK_C": power_of_two(width),
        "BLOCK_D": power_of_two(keys_width),
        "BLOCK_K": piece,
    }
    search = Launch(_emca_attention_fwd_kernel, (splits, batch, blocks_v * blocks_q), searching, config.num_warps, config.num_stages)
    merge = Launch(_emca_attention_merge_kernel, (-(-rows // MERGED_ROWS),), merging, num_warps=8, num_stages=3)
    return (search, merge), attended


@torch.no_grad()
def emca_attention(
    features_BPC: Tensor,
    queries_BQC: Tensor,
    mask: Mask | None,
    position_BPC: Tensor | None,
    query_position_BQC: Tensor | None,
    projections: Projections,
    scale: Tensor | None,
    *,
    selection: str,
    residual: str,
    splits: int | None = None,
) -> Attended:
    """See `emca_kernels.emca_attention`; sums are float32, and what torch would round to the features' dtype is rounded."""
    launches, attended = plan(
        features_BPC,
        queries_BQC,
        mask,
        position_BPC,
        query_position_BQC,
        projections,
        scale,
        selection=selection,
        residual=residual,
        arch=architecture(features_BPC.device),
        splits=splits,
    )
    for launch in launches:
        launch.run(features_BPC.device)
    return attended


def variants(arch: int) -> Iterator[tuple[str, tuple[Launch, ...]]]:
    """Name and launches of one call for each branch of the kernels and each entry of the tables, on tensors without values."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    cases = [("bf16", selection, mask, 256, 100, "") for selection in ("argmax", "softmax") for mask in MASKS]
    cases += [("fp32", selection, mask, 256, 100, "") for selection in ("argmax", "softmax") for mask in ("bool", "embedding")]
    cases += [(dtype, "mean", mask, 256, 100, "") for dtype in ("bf16", "fp32") for mask in ("bool", "embedding")]
    cases += [(dtype, selection, "bool", 64, 37, "") for dtype in ("bf16", "fp32") for selection in ("argmax", "softmax")]
    cases += [("fp16", "argmax", "bool", 256, 1, ""), ("bf16", "argmax", "bool", 128, 100, "raw")]
    both = [(dtype, selection, mask) for dtype in ("bf16", "fp32") for selection in ("argmax", "softmax") for mask in ("bool", "embedding")]
    cases += [(dtype, selection, mask, 256, 100, "position") for dtype, selection, mask in both]
    cases += [("bf16", "mean", "bool", 256, 100, "position"), ("bf16", "argmax", "packed", 256, 100, "pixels contiguous")]
    for dtype, selection, kind, width, count, extra in cases:
        features = torch.empty(2, 32768, width, dtype=dtypes[dtype], device="meta")
        queries = features.new_empty(2, count, width)
        position = features[:1].expand_as(features) if extra == "position" else None
        query_position = queries[:1].expand_as(queries) if extra == "position" else None
        if extra == "pixels contiguous":
            features = features.mT.contiguous().mT
        square, line = features.new_empty(width, width), features.new_empty(width)
        launches, _ = plan(
            features,
            queries,
            example_mask(kind, features, count),
            position,
            query_position,
            Projections(square, line, square, line, square, line, line, square, line),
            line[:1] if selection == "softmax" and extra == "position" else None,
            selection=selection,
            residual="raw" if extra == "raw" else "projected",
            arch=arch,
        )
        yield " ".join(filter(None, (dtype, selection, f"mask={kind}", f"C={width}", f"Q={count}", extra))), launches
