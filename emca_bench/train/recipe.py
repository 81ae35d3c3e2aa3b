"""How a model is trained, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from emca_bench.errors import UsageError
from emca_bench.models.mask2former import Mask2Former

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Numbers of a training run; Mask2Former's where they carry over to small models and short schedules.

    Attributes:
        steps: optimiser steps.
        batch: images per step.
        crop: (H, W) of the augmented training crops.
        scale: least and greatest factor of the scale jitter in front of the crop.
        learning_rate: peak, of everything but a pretrained backbone.
        backbone_multiplier: of the learning rate of a pretrained backbone.
        weight_decay: of AdamW; norms and embeddings have none.
        warmup: share of the steps over which the rate rises; then it falls as a cosine to zero.
        clip_norm: largest 2-norm of all gradients together.
        points: sampled points per mask in matching and losses.
        seed: of data order, augmentation and point sampling.
    """

    steps: int
    batch: int
    crop: tuple[int, int]
    scale: tuple[float, float] = (0.75, 1.5)
    learning_rate: float = 1e-3
    backbone_multiplier: float = 0.1
    weight_decay: float = 0.05
    warmup: float = 0.05
    clip_norm: float = 1.0
    points: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.points < 1 or self.learning_rate <= 0:
            raise UsageError(f"training needs steps, batch and points of at least 1 and a positive learning rate; found {self}")

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at a step, counted from 0."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return (step + 1) / rising
        return 0.5 + 0.5 * math.cos(math.pi * (step - rising) / max(1, self.steps - rising))


def make_optimizer(model: Mask2Former, recipe: Recipe, *, pretrained_backbone: bool) -> torch.optim.AdamW:
    """AdamW with the recipe's groups: no decay on norms and embeddings, a smaller rate for a pretrained backbone."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    backbone = {id(parameter) for parameter in model.backbone.parameters()}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            multiplier = recipe.backbone_multiplier if pretrained_backbone and id(parameter) in backbone else 1.0
            decay = 0.0 if isinstance(module, (*NORMS, nn.Embedding)) else recipe.weight_decay
            groups.setdefault((multiplier * recipe.learning_rate, decay), []).append(parameter)
    return torch.optim.AdamW([{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()])
