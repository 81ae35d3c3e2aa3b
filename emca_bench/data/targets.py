"""From samples to what the criterion compares with: one binary mask per class or per segment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from emca_bench.data.base import IGNORE, IMAGE_PADDING, Sample
from emca_bench.errors import UsageError, did_you_mean, listing

SIZE_DIVISOR = 32
"""Sides of a batch are multiples of this, the coarsest stride of the backbones."""


@dataclass(frozen=True, eq=False)
class Targets:
    """The truth of one image for set prediction; T is 0 where nothing is labelled.

    Attributes:
        labels: int64 [T], class indices.
        masks: bool [T, H, W], disjoint.
        valid: bool [H, W], False for ignored pixels and padding. Metrics leave them out; the published loss takes them as background.
    """

    labels: Tensor
    masks: Tensor
    valid: Tensor

    def to(self, device: torch.device | str) -> Targets:
        """The same targets on a device."""
        return Targets(self.labels.to(device), self.masks.to(device), self.valid.to(device))


def semantic_targets(sample: Sample) -> Targets:
    """One mask per class present, in the order of classes; valid where the semantic map is not IGNORE."""
    semantic_HW = torch.from_numpy(np.ascontiguousarray(sample.semantic)).long()
    valid_HW = semantic_HW != IGNORE
    labels_T = semantic_HW[valid_HW].unique()
    return Targets(labels_T, semantic_HW == labels_T[:, None, None], valid_HW)


def panoptic_targets(sample: Sample) -> Targets:
    """One mask per segment but crowds, in the order of segments; valid where one of them is.

    Raises:
        UsageError: the sample has no panoptic truth.
    """
    if sample.panoptic is None:
        raise UsageError(f"sample {sample.name!r} has semantic labels only; expected panoptic labels, or the task 'semantic'")
    panoptic_HW = torch.from_numpy(np.ascontiguousarray(sample.panoptic)).long()
    told_apart = [segment for segment in sample.segments if not segment.iscrowd]
    ids_T = torch.tensor([segment.id for segment in told_apart], dtype=torch.int64)
    labels_T = torch.tensor([segment.category for segment in told_apart], dtype=torch.int64)
    masks_THW = panoptic_HW == ids_T[:, None, None]
    return Targets(labels_T, masks_THW, masks_THW.any(0))


TASKS: dict[str, Callable[[Sample], Targets]] = {"semantic": semantic_targets, "panoptic": panoptic_targets}


def collate(samples: Sequence[Sample], task: str) -> tuple[Tensor, list[Targets]]:
    """Batch samples of any sizes, padded at the bottom and the right to common sides that are multiples of SIZE_DIVISOR.

    Args:
        samples: B samples, at least one.
        task: "semantic" or "panoptic".

    Returns:
        images: float32 [B, 3, H, W], RGB in 0..255, padded with IMAGE_PADDING.
        targets: B targets with maps of [H, W]; padding is not valid and in no mask.

    Raises:
        UsageError: no samples, an unknown task, or a sample without the labels of the task.
    """
    if task not in TASKS:
        raise UsageError(f"unknown task {task!r}{did_you_mean(task, TASKS)}; known: {listing(TASKS)}")
    if not samples:
        raise UsageError("a batch of 0 samples was asked for; expected at least 1")
    H, W = (-(-max(sample.size[side] for sample in samples) // SIZE_DIVISOR) * SIZE_DIVISOR for side in range(2))
    images_B3HW = torch.full((len(samples), 3, H, W), float(IMAGE_PADDING))
    targets = []
    for image_3HW, sample in zip(images_B3HW, samples, strict=True):
        h, w = sample.size
        image_3HW[:, :h, :w] = torch.from_numpy(np.ascontiguousarray(sample.image)).permute(2, 0, 1)
        unpadded = TASKS[task](sample)
        margin = (0, W - w, 0, H - h)
        targets.append(Targets(unpadded.labels, F.pad(unpadded.masks, margin), F.pad(unpadded.valid, margin)))
    return images_B3HW, targets
