"""Hungarian matching of predicted and true segments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from emca_bench.models.mask_logits import at_least_float32, values_at
from emca_bench.models.point_sampling import PackedMasks
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
    predictions: Predictions,
    targets: Sequence[Segments],
    *,
    points: int,
    class_weight: float,
    mask_weight: float,
    dice_weight: float,
    packed: Sequence[PackedMasks] | None = None,
) -> list[Match]:
    """The cheapest assignment of queries to true segments, per image.

    Costs: minus the class probability, binary cross-entropy and dice of the masks at random points that all masks of an image share.

    Source: Mask2Former, section 3.3 and its published matcher.

    Args:
        predictions: of a batch.
        targets: one per image.
        points: that masks are compared at.
        class_weight, mask_weight, dice_weight: of the three costs.
        packed: the masks of the targets, where the caller has them already.

    Raises:
        DivergedError: a cost is not finite.
    """
    packed = [PackedMasks(target.masks) for target in targets] if packed is None else packed
    class_logits_BQK = at_least_float32(predictions.class_logits)
    costs_QT = []
    for image, (class_logits_QK, target, masks) in enumerate(zip(class_logits_BQK, targets, packed, strict=True)):
        at = torch.rand(1, points, 2, device=class_logits_QK.device, dtype=class_logits_QK.dtype)
        if not len(target.labels):
            costs_QT.append(class_logits_QK[:, :0])
            continue
        predicted_QS, true_TS = values_at(predictions.masks, image, at), masks.at(at)
        costs_QT.append(
            mask_weight * _pairwise_cross_entropy(predicted_QS, true_TS)
            - class_weight * class_logits_QK.softmax(-1)[:, target.labels]
            + dice_weight * _pairwise_dice(predicted_QS, true_TS)
        )
    return [Match(*map(torch.as_tensor, linear_sum_assignment(cost_QT))) for cost_QT in _on_host(costs_QT)]


def _on_host(costs_QT: Sequence[Tensor]) -> list[npt.NDArray[Any]]:
    """Costs of all images, in one transfer."""
    on_host = torch.cat([cost_QT.flatten() for cost_QT in costs_QT]).cpu()
    if not on_host.isfinite().all():
        raise DivergedError("matching costs are not finite: training has diverged; try a smaller learning rate")
    parts = on_host.split([cost_QT.numel() for cost_QT in costs_QT])
    return [part.view(cost_QT.shape).numpy() for part, cost_QT in zip(parts, costs_QT, strict=True)]


def _pairwise_cross_entropy(predicted_QS: Tensor, true_TS: Tensor) -> Tensor:
    # softplus(-x) t + softplus(x) (1 - t) = softplus(x) - x t
    return (F.softplus(predicted_QS).sum(-1, keepdim=True) - predicted_QS @ true_TS.mT) / predicted_QS.shape[-1]


def _pairwise_dice(predicted_QS: Tensor, true_TS: Tensor) -> Tensor:
    probability = predicted_QS.sigmoid()
    overlap = 2 * probability @ true_TS.mT
    total = probability.sum(-1)[:, None] + true_TS.sum(-1)
    return 1 - (overlap + 1) / (total + 1)
