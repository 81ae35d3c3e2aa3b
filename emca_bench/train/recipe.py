"""How a model is trained, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from emca_bench.data import Augmentation
from emca_bench.errors import UsageError, did_you_mean, listing
from emca_bench.models.mask2former import Mask2Former

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
EMBEDDINGS = ("relative_position_bias_table", "absolute_pos_embed")
"""Parameters of Swin that are embeddings without being an `nn.Embedding`."""

SCHEDULES = ("cosine", "poly")
PRECISIONS = ("float32", "bfloat16")

POLY_POWER = 0.9


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Numbers of a training run; the defaults suit small models and short schedules.

    Attributes:
        steps: optimiser steps.
        batch: images per step, of all processes together.
        crop: (H, W) of the augmented training crops.
        scale, scale_draw, short_side, category_area, color: see `data.Augmentation`.
        learning_rate: peak, of everything but a pretrained backbone.
        backbone_multiplier: of the learning rate of a pretrained backbone.
        weight_decay: of AdamW; norms and embeddings have none.
        warmup: share of the steps over which the rate rises.
        schedule: "cosine" or "poly" (power 0.9), how it falls to zero afterwards.
        clip_norm: largest 2-norm of all gradients together.
        points: sampled points per mask in matching and losses.
        precision: "float32", or "bfloat16" for autocast with weights in float32.
        ema: decay of an exponential moving average of the weights, which is what is evaluated then; 0 for none.
        selection_weight: of the loss on the choice of pixels, see `selection_loss`; 0 for none.
        frozen_norms: whether batch norms keep their statistics and their affine numbers.
        seed: of data order, augmentation and point sampling.
    """

    steps: int
    batch: int
    crop: tuple[int, int]
    scale: tuple[float, float] = (0.75, 1.5)
    scale_draw: str = "log"
    short_side: int = 0
    category_area: float = 1.0
    color: str = "simple"
    learning_rate: float = 1e-3
    backbone_multiplier: float = 0.1
    weight_decay: float = 0.05
    warmup: float = 0.05
    schedule: str = "cosine"
    clip_norm: float = 1.0
    points: int = 1024
    precision: str = "float32"
    ema: float = 0.0
    selection_weight: float = 0.0
    frozen_norms: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.points < 1 or self.learning_rate <= 0 or self.clip_norm <= 0:
            raise UsageError(f"training needs steps, batch and points of at least 1, positive learning_rate and clip_norm; found {self}")
        if not 0 <= self.ema < 1 or not 0 <= self.warmup <= 1 or min(self.short_side, self.seed) < 0:
            raise UsageError(f"training needs 0 <= ema < 1, 0 <= warmup <= 1, short_side and seed of at least 0; found {self}")
        self.augmentation()
        if not 0 <= self.selection_weight < math.inf:
            raise UsageError(f"selection_weight={self.selection_weight}; expected a number of at least 0")
        for name, found, known in (("schedule", self.schedule, SCHEDULES), ("precision", self.precision, PRECISIONS)):
            if found not in known:
                raise UsageError(f"{name}={found!r}{did_you_mean(found, known)}; expected one of {', '.join(known)}")

    def augmentation(self) -> Augmentation:
        """Of the training images."""
        names = ("scale", "scale_draw", "short_side", "category_area", "color")
        return Augmentation(self.crop, **{name: getattr(self, name) for name in names})

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at a step, counted from 0."""
        rising = max(1, round(self.warmup * self.steps)) if self.warmup else 0
        if step < rising:
            return (step + 1) / rising
        done = min(1.0, (step - rising) / max(1, self.steps - rising))
        return (1 - done) ** POLY_POWER if self.schedule == "poly" else 0.5 + 0.5 * math.cos(math.pi * done)


RECIPES: dict[str, Mapping[str, Any]] = {
    "short": {},
    "mask2former": {
        "scale": (0.5, 2.0),
        "scale_draw": "tenths",
        "color": "ssd",
        "learning_rate": 1e-4,
        "warmup": 0.0,
        "schedule": "poly",
        "clip_norm": 0.01,
        "points": 12544,
        "precision": "bfloat16",
    },
}
"""What a recipe changes in the defaults. mask2former: the published one for ADE20K and Cityscapes (steps, batch, crop and short_side
depend on the data; its category_area is 1)."""


def make_recipe(name: str, **numbers: Any) -> Recipe:
    """A named recipe with some of its numbers set.

    Raises:
        UsageError: an unknown name, or a number that cannot be used.
    """
    if name not in RECIPES:
        raise UsageError(f"unknown recipe {name!r}{did_you_mean(name, RECIPES)}; known: {listing(RECIPES)}")
    return Recipe(**{**RECIPES[name], **numbers})


def freeze_norms(model: nn.Module) -> None:
    """Batch norms keep what they have: to be called after every `model.train()`."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval().requires_grad_(False)


def make_optimizer(model: Mask2Former, recipe: Recipe, *, pretrained_backbone: bool) -> torch.optim.AdamW:
    """AdamW with the recipe's groups: no decay on norms and embeddings, a smaller rate for a pretrained backbone."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    backbone = {id(parameter) for parameter in model.backbone.parameters()}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            multiplier = recipe.backbone_multiplier if pretrained_backbone and id(parameter) in backbone else 1.0
            decay = 0.0 if isinstance(module, (*NORMS, nn.Embedding)) or name in EMBEDDINGS else recipe.weight_decay
            groups.setdefault((multiplier * recipe.learning_rate, decay), []).append(parameter)
    return torch.optim.AdamW([{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()])
