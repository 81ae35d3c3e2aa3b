"""Masks at sampled points instead of at every pixel (PointRend)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_points(maps_NChw: Tensor, points_NS2: Tensor) -> Tensor:
    """Bilinear values [N, C, S] of maps [N, C, h, w] at points (x, y) in 0..1 of the map, [N, S, 2]."""
    grid = 2 * points_NS2[:, :, None] - 1
    return F.grid_sample(maps_NChw, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[..., 0]


def sample_masks(masks_NHW: Tensor, points_NS2: Tensor) -> Tensor:
    """As `sample_points`, of boolean masks, reading only the pixels beside the points: masks are large and points are few.

    Args:
        masks_NHW: bool [N, H, W].
        points_NS2: (x, y) in 0..1, [N, S, 2], or [1, S, 2] for points that all masks share.

    Returns:
        [N, S] in 0..1, of the points' dtype.
    """
    masks, height, width = masks_NHW.shape
    pixels = masks_NHW.flatten(1)
    x, y = (points_NS2 * points_NS2.new_tensor([width, height]) - 0.5).unbind(-1)
    left, top = x.floor(), y.floor()
    values_NS = points_NS2.new_zeros(masks, points_NS2.shape[1])
    for column, row in ((left, top), (left + 1, top), (left, top + 1), (left + 1, top + 1)):
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        weight = (1 - (x - column).abs()) * (1 - (y - row).abs()) * inside
        at = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long()
        values_NS += weight * (pixels[:, at[0]] if len(at) == 1 else pixels.gather(1, at))
    return values_NS


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
    chosen = uncertainty_NS.topk(important, dim=1, sorted=False).indices
    kept = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
    anywhere = torch.rand(masks, points - important, 2, device=device, dtype=mask_logits_N1hw.dtype)
    return torch.cat([kept, anywhere], 1)
