"""Masks at sampled points instead of at every pixel (PointRend)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_points(maps_NChw: Tensor, points_NS2: Tensor) -> Tensor:
    """Bilinear values [N, C, S] of maps [N, C, h, w] at points (x, y) in 0..1 of the map, [N, S, 2]."""
    grid = 2 * points_NS2[:, :, None] - 1
    return F.grid_sample(maps_NChw, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[..., 0]


def spread_points(values_NCS: Tensor, points_NS2: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [N, C, h, w] of a size with values [N, C, S] spread over the pixels around their points: the adjoint of `sample_points`."""
    grid = 2 * points_NS2[:, :, None] - 1
    # of the maps that were sampled the operator reads the shape
    maps_NChw = values_NCS.new_empty(*values_NCS.shape[:2], *size)
    bilinear, zeros = 0, 0
    spread: Tensor = torch.ops.aten.grid_sampler_2d_backward(
        values_NCS[..., None], maps_NChw, grid, bilinear, zeros, align_corners=False, output_mask=[True, False]
    )[0]
    return spread


class PackedMasks:
    """Boolean masks to be sampled at points, which are few where masks are large: the four pixels around each place are bits of one byte.

    Args:
        masks_NHW: bool [N, H, W].
    """

    def __init__(self, masks_NHW: Tensor) -> None:
        # a border of zeros: what lies beyond the mask
        padded = F.pad(masks_NHW.bool().view(torch.uint8), (1, 1, 1, 1))
        beside = padded[..., :-1].add(padded[..., 1:], alpha=2)
        self._corners_Nhw = beside[:, :-1].add(beside[:, 1:], alpha=4)

    def __len__(self) -> int:
        return len(self._corners_Nhw)

    def at(self, points_NS2: Tensor, chosen: Tensor | None = None) -> Tensor:
        """As `sample_points`: bilinear values, zero beyond the border.

        Args:
            points_NS2: (x, y) in 0..1, [N, S, 2], or [1, S, 2] for points that all masks share.
            chosen: int64 [N], the masks that are sampled; None: all.

        Returns:
            [N, S] in 0..1, of the points' dtype.
        """
        masks, places_down, places_along = self._corners_Nhw.shape
        if chosen is None:
            chosen = torch.arange(masks, device=points_NS2.device)
        x, y = (points_NS2[..., axis] * (places - 1) - 0.5 for axis, places in enumerate((places_along, places_down)))
        left, top = x.floor(), y.floor()
        place_NS = (top.long() + 1) * places_along + left.long() + 1 + chosen[:, None] * (places_down * places_along)
        corners_NS = self._corners_Nhw.view(-1).index_select(0, place_NS.view(-1)).view(place_NS.shape)
        here, right, below, across = ((corners_NS >> bit & 1).to(points_NS2.dtype) for bit in range(4))
        return here.lerp(right, x - left).lerp(below.lerp(across, x - left), y - top)


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
