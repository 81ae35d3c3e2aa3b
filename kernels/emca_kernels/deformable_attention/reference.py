"""Readable definition of multi-scale deformable attention: the oracle of every faster backend. Differentiable by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def deformable_attention(
    value_BPMd: Tensor, spatial_shapes: list[tuple[int, int]], locations_BQMLN2: Tensor, weights_BQMLN: Tensor
) -> Tensor:
    """See `emca_kernels.deformable_attention`."""
    batch, _, heads, width = value_BPMd.shape
    queries, points = locations_BQMLN2.shape[1], locations_BQMLN2.shape[4]
    grids_BMLQN2 = (2 * locations_BQMLN2 - 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 1)
    sampled = []
    for level, (value_BpMd, (height, columns)) in enumerate(
        zip(value_BPMd.split([h * w for h, w in spatial_shapes], dim=1), spatial_shapes, strict=True)
    ):
        map_Ndhw = value_BpMd.permute(0, 2, 3, 1).reshape(batch * heads, width, height, columns)
        sampled.append(F.grid_sample(map_Ndhw, grids_BMLQN2[:, level], mode="bilinear", padding_mode="zeros", align_corners=False))
    sampled_BMdQLN = torch.stack(sampled, dim=-2).view(batch, heads, width, queries, len(spatial_shapes), points)
    weights_BM1QLN = weights_BQMLN.transpose(1, 2)[:, :, None]
    return (sampled_BMdQLN * weights_BM1QLN).sum((-2, -1)).permute(0, 3, 1, 2).flatten(2)
