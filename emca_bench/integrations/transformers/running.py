"""Hugging Face's Mask2Former on the images that ours takes, with its own way to label maps: what is measured beside ours."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mask2FormerImageProcessorPil

from emca_bench.integrations.transformers.convert import to_transformers
from emca_bench.models.mask2former import SIZE_DIVISIBILITY, Mask2Former


class TransformersMask2Former(nn.Module):
    """Its model with our images in front, RGB in 0..255."""

    def __init__(self, model: Mask2Former) -> None:
        super().__init__()
        self.hf_model: Any = to_transformers(model)
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer("pixel_mean", model.pixel_mean)
        self.register_buffer("pixel_std", model.pixel_std)
        self.processor: Any = Mask2FormerImageProcessorPil()

    def forward(self, images: Tensor) -> Any:
        """[B, 3, H, W] to what Hugging Face's model returns."""
        return self.hf_model(pixel_values=self._prepared(images), output_auxiliary_logits=False)

    def _prepared(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        normalised = (images - self.pixel_mean) / self.pixel_std
        return F.pad(normalised, (0, -width % SIZE_DIVISIBILITY, 0, -height % SIZE_DIVISIBILITY))

    def loss(self, images: Tensor, labels: list[Tensor], masks: list[Tensor]) -> Tensor:
        """Its weighted loss of images with classes int64 [T] and masks bool [T, H, W] each, all decoder layers included."""
        truth: dict[str, Any] = {"class_labels": labels, "mask_labels": [mask.to(images.dtype) for mask in masks]}
        return self.hf_model(pixel_values=self._prepared(images), **truth).loss.sum()

    def label(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """[B, 3, H, W] to label maps [B, H, W] by the processor's own post-processing."""
        return torch.stack(self.processor.post_process_semantic_segmentation(self(images), target_sizes=[size] * len(images)))


def as_transformers_runs(model: Mask2Former) -> TransformersMask2Former:
    """Hugging Face's Mask2Former with the same weights, on the same device and in the same mode."""
    return TransformersMask2Former(model).train(model.training).requires_grad_(False)


def as_transformers_trains(model: Mask2Former, *, points: int) -> TransformersMask2Former:
    """The same for training with its own loss at so many points per mask; norms keep their statistics."""
    theirs = TransformersMask2Former(model).requires_grad_(True).eval()
    theirs.hf_model.criterion.num_points = points
    theirs.hf_model.criterion.matcher.num_points = points
    return theirs
