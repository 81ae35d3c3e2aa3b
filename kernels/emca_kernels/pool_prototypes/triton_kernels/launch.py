"""From a call of the operator to its two launches."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from emca_kernels.masks import EmbeddingMask, Mask
from emca_kernels.pool_prototypes.triton_kernels.kernels import Parts, merge_sums_kernel, pool_prototypes_fwd_kernel
from emca_kernels.triton.arguments import constants, count_queries, streamed_of, tiling_of
from emca_kernels.triton.configs import Config, config_of, power_of_two, shares_of
from emca_kernels.triton.examples import MASKS, described, example
from emca_kernels.triton.runtime import Launch, architecture

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


def empty_parts(like: Tensor, splits: int, shape: tuple[int, ...], width: int) -> Parts:
    """Room for what `splits` programs leave for each row; `shape` is that of the rows."""
    sums = like.new_empty((splits, *shape, width), dtype=torch.float32)
    return Parts(sums, like.new_empty((splits, 3, *shape), dtype=torch.float32), math.prod(shape), width)


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
    """The launches of one call and what they write: pooled features and logsumexp. See `select_prototypes.triton_kernels.launch.plan`."""
    batch, pixels = features_BPC.shape[:2]
    width = features_BPC.shape[2] // heads
    config = config_for(features_BPC, width, mask, position_BPC, arch)
    count = count_queries(queries_BQC, mask)
    block_v = values_of(features_BPC, width)
    blocks_v = -(-width // block_v)
    block_q, blocks_q, splits, span = shares_of(config, count, pixels, batch * heads * blocks_v, arch, splits)
    shape = (batch, count, heads)
    parts = empty_parts(features_BPC, splits, shape, width)
    pooled = features_BPC.new_empty((*shape, width))
    logsumexp = features_BPC.new_empty(shape, dtype=torch.float32)
    arguments = {
        "streamed": streamed_of(features_BPC, queries_BQC, mask, position_BPC, width=width),
        "parts": parts,
        "span": span,
        "HEADS": heads,
        "SOFT": queries_BQC is not None,
        "BLOCKS_Q": blocks_q,
        "BLOCK_V": block_v,
        "TILING": constants(tiling_of(features_BPC, mask, position_BPC, config, width=width, block_q=block_q)),
    }
    grid = (splits, batch * heads, blocks_v * blocks_q)
    pool = Launch(pool_prototypes_fwd_kernel, grid, arguments, config.num_warps, config.num_stages)
    merging = {"parts": parts, "splits": splits, "pooled": pooled, "logsumexp": logsumexp}
    merging |= {"SOFT": queries_BQC is not None, "BLOCK_R": 16, "BLOCK_V": block_v}
    merge = Launch(merge_sums_kernel, (-(-parts.rows // 16), blocks_v), merging, num_warps=4, num_stages=2)
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
        features, queries, mask, position = example(dtype, kind, channels, count, extra)
        launches, *_ = plan(features, queries if soft else None, mask, position, heads=heads, arch=arch)
        how = "soft" if soft else "mean"
        yield described(dtype, how, f"mask={kind}", f"C={channels}", f"M={heads}", f"Q={count}", extra), launches
