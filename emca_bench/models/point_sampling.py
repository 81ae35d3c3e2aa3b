"""Masks at sampled points instead of at every pixel (PointRend)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_points(maps_NChw: Tensor, points_NS2: Tensor) -> Tensor:
    """Bilinear values [N, C, S] of maps [N, C, h, w] at points (x, y) in 0..1 of the map, [N, S, 2]."""
    grid = 2 * points_NS2[:, :, None] - 1
    return F.grid_sample(maps_NChw, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[..., 0]


@torch.no_grad()
def uncertain_points(mask_logits_N1hw: Tensor, *, points: int, oversampling: float, importance: float) -> Tensor:
    """Points [N, S, 2] of which a share lies where the masks are least certain, the rest anywhere.

    Source: Kirillov et al., PointRend, 2020, section 3.1; random numbers are drawn in the order of the published code.

    Args:
        mask_logits_N1hw: [N, 1, h, w].
        points: S.
        oversampling: candidates per point, at least 1.
        importance: share of the points that are chosen by uncertainty, 0..1.
    """
    masks, device = mask_logits_N1hw.shape[0], mask_logits_N1hw.device
    candidates = torch.rand(masks, int(points * oversampling), 2, device=device, dtype=mask_logits_N1hw.dtype)
    uncertainty_NS = -sample_points(mask_logits_N1hw, candidates)[:, 0].abs()
    important = int(importance * points)
    chosen = uncertainty_NS.topk(important, dim=1).indices
    kept = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
    anywhere = torch.rand(masks, points - important, 2, device=device, dtype=mask_logits_N1hw.dtype)
    return torch.cat([kept, anywhere], 1)
