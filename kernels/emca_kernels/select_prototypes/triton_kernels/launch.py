"""From a call of the operator to its two launches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from emca_kernels.masks import EmbeddingMask, Mask
from emca_kernels.select_prototypes.triton_kernels.kernels import merge_keys_kernel, select_prototypes_fwd_kernel
from emca_kernels.triton.arguments import constants, streamed_of, tiling_of
from emca_kernels.triton.configs import Config, config_of, power_of_two, shares_of
from emca_kernels.triton.examples import MASKS, described, example
from emca_kernels.triton.runtime import Launch, architecture

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
    width = channels // heads
    config = config_for(features_BPC, mask, position_BPC, arch)
    slots = power_of_two(k, 1)
    if slots > 1:
        config = replace(config, block_q=min(config.block_q, BLOCK_Q_OF_MANY))
    block_q, blocks_q, splits, span = shares_of(config, count, pixels, batch * heads, arch, splits)
    keys = queries_BQC.new_empty((batch, count, heads, splits * slots), dtype=torch.int64)
    indices = queries_BQC.new_empty((batch, count, heads, k), dtype=torch.int64)
    scores = features_BPC.new_empty((batch, count, heads, k))
    arguments = {
        "streamed": streamed_of(features_BPC, queries_BQC, mask, position_BPC, width=width),
        "keys": keys,
        "span": span,
        "HEADS": heads,
        "K": slots,
        "TILING": constants(tiling_of(features_BPC, mask, position_BPC, config, width=width, block_q=block_q)),
    }
    grid = (splits, batch * heads, blocks_q)
    search = Launch(select_prototypes_fwd_kernel, grid, arguments, config.num_warps, config.num_stages)
    rows = batch * count * heads
    merging = {"keys": keys, "indices": indices, "scores": scores, "rows": rows, "candidates": splits * slots, "count": k}
    merge = Launch(merge_keys_kernel, (-(-rows // 16),), {**merging, "BLOCK_R": 16, "BLOCK_S": 64}, num_warps=4, num_stages=2)
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
        launches, *_ = plan(*example(dtype, kind, channels, count, extra), k=k, heads=heads, arch=arch)
        yield described(dtype, f"mask={kind}", f"C={channels}", f"M={heads}", f"K={k}", f"Q={count}", extra), launches
