"""Mask2Former's training loss: matched classes, and masks at sampled points, with deep supervision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from emca_bench.models.mask_logits import at_least_float32, logits_of
from emca_bench.models.matcher import Match, Segments, match_segments
from emca_bench.models.point_losses import losses_at_points
from emca_bench.models.point_sampling import PackedMasks, uncertain_points
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

    def forward(self, predictions: Predictions, targets: Sequence[Segments], chosen: Sequence[Chosen] | None = None) -> dict[str, Tensor]:
        """Unweighted losses, the last prediction's under `loss_ce`, `loss_mask`, `loss_dice`, earlier ones with `_0`, `_1`, ...

        Half-precision predictions are compared in float32. Ignored pixels are background of every mask, as in the published loss.

        Args:
            predictions: with the auxiliary ones.
            targets: one of each image.
            chosen: by `choose`, where the caller has use for it; chosen here otherwise.

        Raises:
            ValueError: masks of another size than the padded input that the predictions cover.
        """
        every = (predictions, *predictions.auxiliary)
        chosen = self.choose(predictions, targets) if chosen is None else chosen
        by_name = {"loss_ce": self._class_losses(every, targets, chosen), **self._mask_losses(every, targets, chosen)}
        suffixes = ("", *(f"_{index}" for index in range(len(predictions.auxiliary))))
        return {f"{name}{suffix}": losses[index] for index, suffix in enumerate(suffixes) for name, losses in by_name.items()}

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum that is minimised."""
        return torch.stack(list(self.weighted(losses).values())).sum()

    def weighted(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each loss times its weight, under the same names."""
        return {name: self.weights["_".join(name.split("_")[:2])] * loss for name, loss in losses.items()}

    def choose(self, predictions: Predictions, targets: Sequence[Segments]) -> list[Chosen]:
        """What the prediction and each of its auxiliary ones are held against.

        Random numbers are drawn in the order of the published code; they decide all the rest, so that the losses of all predictions can
        be computed together.

        Raises:
            ValueError: masks of another size than the padded input that the predictions cover.
        """
        _check_sizes(predictions, targets)
        packed = [PackedMasks(target.masks) for target in targets]
        return [self._choose(each, targets, packed) for each in (predictions, *predictions.auxiliary)]

    @torch.no_grad()
    def _choose(self, predictions: Predictions, targets: Sequence[Segments], packed: Sequence[PackedMasks]) -> Chosen:
        matches = match_segments(
            predictions,
            targets,
            points=self.points,
            class_weight=self.weights["loss_ce"],
            mask_weight=self.weights["loss_mask"],
            dice_weight=self.weights["loss_dice"],
            packed=packed,
        )
        device = predictions.class_logits.device
        matches = [Match(match.queries.to(device), match.segments.to(device)) for match in matches]
        logits_Nhw = torch.cat([logits_of([predictions.masks], image, [match.queries]) for image, match in enumerate(matches)])
        points_NS2 = uncertain_points(logits_Nhw[:, None], points=self.points, oversampling=self.oversampling, importance=self.importance)
        points = points_NS2.split([len(match.queries) for match in matches])
        true = [masks.at(at, match.segments) for masks, at, match in zip(packed, points, matches, strict=True)]
        return Chosen(matches, points, true)

    def _class_losses(self, every: Sequence[Predictions], targets: Sequence[Segments], chosen: Sequence[Chosen]) -> Tensor:
        """Of each prediction, [L]."""
        logits_LBQK = torch.stack([at_least_float32(predictions.class_logits) for predictions in every])
        no_object = logits_LBQK.shape[-1] - 1
        wanted_LBQ = torch.full(logits_LBQK.shape[:-1], no_object, device=logits_LBQK.device)
        for wanted_BQ, (matches, *_) in zip(wanted_LBQ, chosen, strict=True):
            for wanted_Q, target, match in zip(wanted_BQ, targets, matches, strict=True):
                wanted_Q[match.queries] = target.labels[match.segments]
        weight = self.empty_weight.to(logits_LBQK.dtype)
        losses = F.cross_entropy(logits_LBQK.flatten(0, 2), wanted_LBQ.flatten(), weight, reduction="none")
        # the mean over the joint batch, so that a run does not depend on the number of its processes
        return losses.view(len(every), -1).sum(1) / _mean_over_processes(weight[wanted_LBQ].flatten(1).sum(1))

    def _mask_losses(self, every: Sequence[Predictions], targets: Sequence[Segments], chosen: Sequence[Chosen]) -> dict[str, Tensor]:
        """Of each prediction, [L]."""
        masks = [predictions.masks for predictions in every]
        sums_L2 = []
        for image in range(len(targets)):
            queries = [matches[image].queries for matches, *_ in chosen]
            # as many in each prediction
            logits_Nhw = logits_of(masks, image, queries).split([len(each) for each in queries])
            losses = [
                losses_at_points(logits, points_NS2[image], true_NS[image])
                for logits, (_, points_NS2, true_NS) in zip(logits_Nhw, chosen, strict=True)
            ]
            sums_L2.append(torch.stack([torch.stack(pair).sum(1) for pair in losses]))
        segments = _segments_per_process(targets, sums_L2[0].device)
        cross_entropy_L, dice_L = (torch.stack(sums_L2).sum(0) / segments).unbind(1)
        return {"loss_mask": cross_entropy_L, "loss_dice": dice_L}


class Chosen(NamedTuple):
    """What a prediction is held against, per image: matched pairs, points [N, S, 2] for each pair, and the true mask there [N, S]."""

    matches: Sequence[Match]
    points_NS2: Sequence[Tensor]
    true_NS: Sequence[Tensor]


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


def _check_sizes(predictions: Predictions, targets: Sequence[Segments]) -> None:
    """Points are relative to the map, so that masks of an unpadded size would misalign silently."""
    expected = tuple(MASK_STRIDE * int(size) for size in predictions.masks.shape[-2:])
    for index, target in enumerate(targets):
        if tuple(target.masks.shape[-2:]) != expected:
            found = list(target.masks.shape)
            raise ValueError(f"masks of target {index} have shape {found}, expected [T, {expected[0]}, {expected[1]}], the padded input")
