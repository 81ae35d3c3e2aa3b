"""Losses of masks at sampled points, with a gradient that needs no more than what was sampled."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from emca_bench.models.point_sampling import sample_points, spread_points


def losses_at_points(logits_Nhw: Tensor, points_NS2: Tensor, true_NS: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy, a mean over points, and dice of each mask, [N] both.

    Source: Mask2Former's published criterion. Gradients reach the logits; the masks themselves are not kept for them.

    Args:
        logits_Nhw: [N, h, w], at least float32.
        points_NS2: (x, y) in 0..1, [N, S, 2].
        true_NS: in 0..1, [N, S].
    """
    return cast(tuple[Tensor, Tensor], _LossesAtPoints.apply(logits_Nhw, points_NS2, true_NS))


class _LossesAtPoints(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_Nhw: Tensor, points_NS2: Tensor, true_NS: Tensor) -> tuple[Tensor, Tensor]:
        logits_NS = sample_points(logits_Nhw[:, None], points_NS2)[:, 0]
        ctx.save_for_backward(logits_NS, points_NS2, true_NS)
        ctx.size = logits_Nhw.shape[1:]
        cross_entropy_N = F.binary_cross_entropy_with_logits(logits_NS, true_NS, reduction="none").mean(1)
        overlap_N, total_N = _overlap(logits_NS.sigmoid(), true_NS)
        return cross_entropy_N, 1 - overlap_N / total_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cross_entropy_N: Tensor, dice_N: Tensor) -> tuple[Tensor, None, None]:
        logits_NS, points_NS2, true_NS = ctx.saved_tensors
        probability_NS = logits_NS.sigmoid()
        overlap_N, total_N = _overlap(probability_NS, true_NS)
        # of dice to the probability: overlap / total^2 - 2 true / total
        gradient_NS = (dice_N * overlap_N / total_N**2)[:, None] - (2 * dice_N / total_N)[:, None] * true_NS
        gradient_NS *= probability_NS * (1 - probability_NS)
        gradient_NS += (probability_NS - true_NS) * (cross_entropy_N / max(1, logits_NS.shape[1]))[:, None]
        gradient_N1hw = spread_points(gradient_NS[:, None], points_NS2, ctx.size)
        return gradient_N1hw[:, 0], None, None


def _overlap(probability_NS: Tensor, true_NS: Tensor) -> tuple[Tensor, Tensor]:
    """Twice the intersection, and the sum of both areas, each with the one that keeps dice finite."""
    return 2 * torch.linalg.vecdot(probability_NS, true_NS) + 1, probability_NS.sum(1) + true_NS.sum(1) + 1
