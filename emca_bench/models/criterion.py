"""Mask2Former's training loss: matched classes, and masks at sampled points, with deep supervision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from emca_bench.models.matcher import Match, Segments, match_segments
from emca_bench.models.point_sampling import sample_masks, sample_points, uncertain_points
from emca_bench.models.predictions import MASK_STRIDE, Predictions


class Criterion(nn.Module):
    """Weighted cross-entropy of classes, binary cross-entropy and dice of masks, for every prediction of the model.

    Source: Mask2Former, section 3.3 and its published criterion.

    Args:
        classes: without "no object".
        points: sampled points per mask, in matching and losses.
        class_weight, mask_weight, dice_weight: of the three losses, in matching too.
        no_object_weight: of the class "no object" in the cross-entropy.
        oversampling, importance: of the sampled points, see `uncertain_points`.
    """

    def __init__(
        self,
        *,
        classes: int,
        points: int = 12544,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        no_object_weight: float = 0.1,
        oversampling: float = 3.0,
        importance: float = 0.75,
    ) -> None:
        super().__init__()
        self.points, self.oversampling, self.importance = points, oversampling, importance
        self.weights = {"loss_ce": class_weight, "loss_mask": mask_weight, "loss_dice": dice_weight}
        weight = torch.ones(classes + 1)
        weight[-1] = no_object_weight
        self.empty_weight: Tensor
        self.register_buffer("empty_weight", weight)

    def forward(self, predictions: Predictions, targets: Sequence[Segments]) -> dict[str, Tensor]:
        """Unweighted losses, the last prediction's under `loss_ce`, `loss_mask`, `loss_dice`, earlier ones with `_0`, `_1`, ...

        Half-precision predictions are compared in float32. Ignored pixels are background of every mask, as in the published loss.

        Raises:
            ValueError: masks of another size than the padded input that the predictions cover.
        """
        _check_sizes(predictions, targets)
        segments = _segments_per_process(targets, predictions.mask_logits.device)
        losses = self._losses(predictions, targets, segments)
        for index, earlier in enumerate(predictions.auxiliary):
            losses |= {f"{name}_{index}": loss for name, loss in self._losses(earlier, targets, segments).items()}
        return losses

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum that is minimised."""
        return torch.stack(list(self.weighted(losses).values())).sum()

    def weighted(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each loss times its weight, under the same names."""
        return {name: self.weights["_".join(name.split("_")[:2])] * loss for name, loss in losses.items()}

    def _losses(self, predictions: Predictions, targets: Sequence[Segments], segments: float) -> dict[str, Tensor]:
        predictions = _at_least_float32(predictions)
        matches = match_segments(
            predictions,
            targets,
            points=self.points,
            class_weight=self.weights["loss_ce"],
            mask_weight=self.weights["loss_mask"],
            dice_weight=self.weights["loss_dice"],
        )
        return {
            "loss_ce": self._class_loss(predictions.class_logits, targets, matches),
            **self._mask_losses(predictions, targets, matches, segments),
        }

    def _class_loss(self, class_logits_BQK: Tensor, targets: Sequence[Segments], matches: list[Match]) -> Tensor:
        no_object = class_logits_BQK.shape[-1] - 1
        wanted_BQ = torch.full(class_logits_BQK.shape[:2], no_object, dtype=torch.int64, device=class_logits_BQK.device)
        for row, target, match in zip(wanted_BQ, targets, matches, strict=True):
            row[match.queries.to(row.device)] = target.labels[match.segments.to(target.labels.device)]
        weight = self.empty_weight.to(class_logits_BQK.dtype)
        total = F.cross_entropy(class_logits_BQK.mT, wanted_BQ, weight, reduction="sum")
        # the mean over the joint batch, so that a run does not depend on the number of its processes
        return total / _mean_over_processes(weight[wanted_BQ].sum())

    def _mask_losses(
        self, predictions: Predictions, targets: Sequence[Segments], matches: list[Match], segments: float
    ) -> dict[str, Tensor]:
        logits_Nhw = torch.cat([masks[match.queries] for masks, match in zip(predictions.mask_logits, matches, strict=True)])
        true_NHW = torch.cat([target.masks[match.segments] for target, match in zip(targets, matches, strict=True)])
        logits_N1hw = logits_Nhw[:, None]
        at = uncertain_points(logits_N1hw.detach(), points=self.points, oversampling=self.oversampling, importance=self.importance)
        true_NS = sample_masks(true_NHW, at)
        logits_NS = sample_points(logits_N1hw, at)[:, 0]
        cross_entropy = F.binary_cross_entropy_with_logits(logits_NS, true_NS, reduction="none").mean(1).sum() / segments
        probability = logits_NS.sigmoid()
        overlap = 2 * (probability * true_NS).sum(-1)
        dice = (1 - (overlap + 1) / (probability.sum(-1) + true_NS.sum(-1) + 1)).sum() / segments
        return {"loss_mask": cross_entropy, "loss_dice": dice}


def _segments_per_process(targets: Sequence[Segments], device: torch.device) -> float:
    """What sums over masks are divided by: true segments, matched or not, their mean over the processes of a distributed training."""
    count = torch.tensor(float(sum(len(target.labels) for target in targets)), device=device)
    return max(_mean_over_processes(count).item(), 1.0)


def _mean_over_processes(value: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value


def _at_least_float32(predictions: Predictions) -> Predictions:
    if predictions.mask_logits.dtype not in (torch.float16, torch.bfloat16):
        return predictions
    return replace(predictions, class_logits=predictions.class_logits.float(), mask_logits=predictions.mask_logits.float())


def _check_sizes(predictions: Predictions, targets: Sequence[Segments]) -> None:
    """Points are relative to the map, so that masks of an unpadded size would misalign silently."""
    expected = tuple(MASK_STRIDE * int(size) for size in predictions.mask_logits.shape[-2:])
    for index, target in enumerate(targets):
        if tuple(target.masks.shape[-2:]) != expected:
            found = list(target.masks.shape)
            raise ValueError(f"masks of target {index} have shape {found}, expected [T, {expected[0]}, {expected[1]}], the padded input")
