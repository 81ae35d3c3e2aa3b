"""Hungarian matching of predicted and true segments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from emca_bench.models.point_sampling import sample_masks, sample_points
from emca_bench.models.predictions import Predictions


class Segments(Protocol):
    """The truth of one image."""

    @property
    def labels(self) -> Tensor:
        """int64 [T] classes."""

    @property
    def masks(self) -> Tensor:
        """bool [T, H, W]."""


class Match(NamedTuple):
    """Matched pairs of one image: queries int64 [T] and segments int64 [T]."""

    queries: Tensor
    segments: Tensor


class DivergedError(FloatingPointError):
    """Predictions are not finite: training has diverged."""


@torch.no_grad()
def match_segments(
    predictions: Predictions, targets: Sequence[Segments], *, points: int, class_weight: float, mask_weight: float, dice_weight: float
) -> list[Match]:
    """The cheapest assignment of queries to true segments, per image.

    Costs: minus the class probability, binary cross-entropy and dice of the masks at random points that all masks of an image share.

    Source: Mask2Former, section 3.3 and its published matcher.

    Raises:
        DivergedError: a cost is not finite.
    """
    matches = []
    for class_logits_QK, mask_logits_Qhw, target in zip(predictions.class_logits, predictions.mask_logits, targets, strict=True):
        at = torch.rand(1, points, 2, device=mask_logits_Qhw.device, dtype=mask_logits_Qhw.dtype)
        predicted_QS = sample_points(mask_logits_Qhw[None], at)[0]
        true_TS = sample_masks(target.masks, at)
        cost_QT = (
            mask_weight * _pairwise_cross_entropy(predicted_QS, true_TS)
            - class_weight * class_logits_QK.softmax(-1)[:, target.labels]
            + dice_weight * _pairwise_dice(predicted_QS, true_TS)
        )
        if not cost_QT.isfinite().all():
            raise DivergedError("matching costs are not finite: training has diverged; try a smaller learning rate")
        queries, segments = linear_sum_assignment(cost_QT.cpu().numpy())
        matches.append(Match(torch.as_tensor(queries), torch.as_tensor(segments)))
    return matches


def _pairwise_cross_entropy(predicted_QS: Tensor, true_TS: Tensor) -> Tensor:
    positive = F.softplus(-predicted_QS) @ true_TS.mT
    negative = F.softplus(predicted_QS) @ (1 - true_TS).mT
    return (positive + negative) / predicted_QS.shape[-1]


def _pairwise_dice(predicted_QS: Tensor, true_TS: Tensor) -> Tensor:
    probability = predicted_QS.sigmoid()
    overlap = 2 * probability @ true_TS.mT
    total = probability.sum(-1)[:, None] + true_TS.sum(-1)
    return 1 - (overlap + 1) / (total + 1)
