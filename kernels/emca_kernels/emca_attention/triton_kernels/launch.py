"""From a call of the operator to its two launches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from emca_kernels.attend_prototypes.reference import smallest_norm
from emca_kernels.emca_attention.arguments import SELECTIONS, Attended, Projections
from emca_kernels.emca_attention.triton_kernels.arguments import Attending, Call, Found, Searching
from emca_kernels.emca_attention.triton_kernels.attend import emca_attention_merge_kernel
from emca_kernels.emca_attention.triton_kernels.search import emca_attention_fwd_kernel
from emca_kernels.masks import Mask
from emca_kernels.pool_prototypes.triton_kernels import launch as pooling
from emca_kernels.pool_prototypes.triton_kernels.kernels import Parts
from emca_kernels.select_prototypes.triton_kernels import launch as selecting
from emca_kernels.triton.arguments import Batched, constants, needs_upcast, streamed_of, strided, tiling_of
from emca_kernels.triton.configs import Config, power_of_two, shares_of
from emca_kernels.triton.examples import MASKS, described, example
from emca_kernels.triton.runtime import Launch, architecture

MERGED_ROWS = 16
PIECES = {(90, "half"): 64, (90, "float"): 32, (80, "half"): 64, (80, "float"): 32}
"""Channels of a product's pieces in the second launch."""
KEYS = {(90, "half"): 32, (90, "float"): 16, (80, "half"): 32, (80, "float"): 32}
"""Key channels of a projection's pieces in the first."""


def _kind(features: Tensor) -> str:
    return "float" if features.dtype == torch.float32 else "half"


def _config_for(call: Call, arch: int) -> Config:
    """The tiles of the loop that streams pixels."""
    features = call.features_BPC
    if call.selection == "argmax":
        return selecting.config_for(features, call.mask, call.position_BPC, arch)
    return pooling.config_for(features, features.shape[2], call.mask, call.position_BPC, arch)


def plan(call: Call, *, arch: int, splits: int | None = None) -> tuple[tuple[Launch, Launch], Attended]:
    """The launches of one call and what they write. See `select_prototypes.triton_kernels.launch.plan`."""
    (batch, count, width), queries = call.queries_BQC.shape, call.queries_BQC
    chooses = call.selection == "argmax"
    config = _config_for(call, arch)
    block_v = power_of_two(width) if chooses else pooling.values_of(call.features_BPC, width)
    blocks_v = -(-width // block_v)
    shares = shares_of(config, count, call.features_BPC.shape[1], batch * blocks_v, arch, splits, per_processor=1)
    tiling = tiling_of(call.features_BPC, call.mask, call.position_BPC, config, width=width, block_q=shares.block_q)
    # products of float32 parts, and sums of softmax, need the registers that the folded rows would fill
    fold_on_chip = tiling.RESIDENT and chooses and _kind(queries) == "half"
    found = _empty_found(call, shares.splits, folds_in_memory=not fold_on_chip and call.selection != "mean")
    searching = Searching(
        SELECTION=SELECTIONS.index(call.selection),
        SCALED=call.scale is not None,
        QUERY_POSITION=call.query_position_BQC is not None,
        FOLD_ON_CHIP=fold_on_chip,
        BLOCKS_Q=shares.blocks_q,
        BLOCK_X=min(config.piece, power_of_two(width)),
        BLOCK_D=min(KEYS[arch, _kind(queries)], power_of_two(found.projected.shape[2])),
        BLOCK_V=block_v,
    )
    arguments = {
        "streamed": streamed_of(call.features_BPC, queries, call.mask, call.position_BPC, width=width),
        "query_position": strided(Batched, call.query_position_BQC, instead=queries),
        "projections": call.projections,
        "scale": queries if call.scale is None else call.scale,
        "found": found,
        "key_width": found.projected.shape[2],
        "span": shares.span,
        "SEARCHING": constants(searching),
        "TILING": constants(tiling),
    }
    grid = (shares.splits, batch, blocks_v * shares.blocks_q)
    search = Launch(emca_attention_fwd_kernel, grid, arguments, config.num_warps, config.num_stages)
    merge, attended = _plan_merge(call, found, shares.splits, arch)
    return (search, merge), attended


def _empty_found(call: Call, splits: int, *, folds_in_memory: bool) -> Found:
    """Room for what the first launch leaves."""
    queries = call.queries_BQC
    batch, count, width = queries.shape
    projected = queries.new_empty((batch, count, len(call.projections.query_bias_D)))
    folded = queries.new_empty(queries.shape) if folds_in_memory else queries
    if call.selection == "argmax":
        keys = queries.new_empty((batch, count, splits), dtype=torch.int64)
        return Found(projected, folded, keys, Parts(queries, queries, batch * count, width))
    return Found(projected, folded, queries, pooling.empty_parts(queries, splits, (batch, count), width))


def _plan_merge(call: Call, found: Found, splits: int, arch: int) -> tuple[Launch, Attended]:
    """The second launch, and the results that it writes."""
    features, queries = call.features_BPC, call.queries_BQC
    width, key_width = queries.shape[2], found.projected.shape[2]
    attended = Attended(
        queries.new_empty(queries.shape),
        queries.new_empty(queries.shape),
        queries.new_empty(queries.shape[:2], dtype=torch.int64 if call.selection == "argmax" else torch.float32),
    )
    attending = Attending(
        SELECTION=SELECTIONS.index(call.selection),
        POSITION=call.position_BPC is not None,
        PROJECTED_RESIDUAL=call.residual == "projected",
        SMALLEST=smallest_norm(features.dtype),
        BLOCK_R=MERGED_ROWS,
        BLOCK_S=32,
        BLOCK_C=power_of_two(width),
        BLOCK_D=power_of_two(key_width),
        BLOCK_K=PIECES[arch, _kind(features)],
        UPCAST=needs_upcast(features, call.mask),
    )
    arguments = {
        # no mask: kernels that differ in nothing else are one
        "streamed": streamed_of(features, queries, None, call.position_BPC, width=width),
        "found": found,
        "projections": call.projections,
        "attended": attended,
        "scratch": queries.new_empty((2, *found.projected.shape)),
        "key_width": key_width,
        "splits": splits,
        "ATTENDING": constants(attending),
    }
    programs = -(-found.parts.rows // MERGED_ROWS)
    return Launch(emca_attention_merge_kernel, (programs,), arguments, num_warps=8, num_stages=3), attended


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
    weights = Projections(*(parameter.contiguous() for parameter in projections))
    call = Call(features_BPC, queries_BQC, mask, position_BPC, query_position_BQC, weights, scale, selection, residual)
    launches, attended = plan(call, arch=architecture(features_BPC.device), splits=splits)
    for launch in launches:
        launch.run(features_BPC.device)
    return attended


def variants(arch: int) -> Iterator[tuple[str, tuple[Launch, ...]]]:
    """Name and launches of one call for each branch of the kernels and each entry of the tables, on tensors without values."""
    cases = [("bf16", selection, mask, 256, 100, "") for selection in ("argmax", "softmax") for mask in MASKS]
    cases += [("fp32", selection, mask, 256, 100, "") for selection in ("argmax", "softmax") for mask in ("bool", "embedding")]
    cases += [(dtype, "mean", mask, 256, 100, "") for dtype in ("bf16", "fp32") for mask in ("bool", "embedding")]
    cases += [(dtype, selection, "bool", 64, 37, "") for dtype in ("bf16", "fp32") for selection in ("argmax", "softmax")]
    cases += [("fp16", "argmax", "bool", 256, 1, ""), ("bf16", "argmax", "bool", 128, 100, "raw")]
    both = [(dtype, selection, mask) for dtype in ("bf16", "fp32") for selection in ("argmax", "softmax") for mask in ("bool", "embedding")]
    cases += [(dtype, selection, mask, 256, 100, "position") for dtype, selection, mask in both]
    cases += [("bf16", "mean", "bool", 256, 100, "position"), ("bf16", "argmax", "packed", 256, 100, "pixels contiguous")]
    for dtype, selection, kind, width, count, extra in cases:
        features, queries, mask, position = example(dtype, kind, width, count, extra)
        query_position = queries[:1].expand_as(queries) if extra == "position" else None
        square, line = features.new_empty(width, width), features.new_empty(width)
        weights = Projections(square, line, square, line, square, line, line, square, line)
        scale = line[:1] if selection == "softmax" and extra == "position" else None
        residual = "raw" if extra == "raw" else "projected"
        call = Call(features, queries, mask, position, query_position, weights, scale, selection, residual)
        yield described(dtype, selection, f"mask={kind}", f"C={width}", f"Q={count}", extra), plan(call, arch=arch)[0]
