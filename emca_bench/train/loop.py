"""The training loop: seeded order and augmentation, one optimiser step per batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from emca_bench.data import Augmentation, Sample
from emca_bench.data.targets import collate
from emca_bench.models.criterion import Criterion
from emca_bench.models.mask2former import Mask2Former
from emca_bench.models.matcher import DivergedError
from emca_bench.train.recipe import Recipe, make_optimizer


@dataclass(frozen=True)
class TrainingLog:
    """What a training run leaves beside the weights: total loss of every step, and wall time in seconds."""

    losses: list[float]
    seconds: float


def batches(samples: Sequence[Sample], recipe: Recipe) -> Iterator[list[Sample]]:
    """Endless augmented batches; each epoch is a new permutation. The same for every model at the same seed."""
    rng = np.random.default_rng(recipe.seed)
    augment = Augmentation(recipe.crop, scale=recipe.scale)
    batch: list[Sample] = []
    while True:
        for index in rng.permutation(len(samples)):
            batch.append(augment(samples[index], rng))
            if len(batch) == recipe.batch:
                yield batch
                batch = []


def train(
    model: Mask2Former,
    samples: Sequence[Sample],
    recipe: Recipe,
    *,
    classes: int,
    task: str,
    pretrained_backbone: bool,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> TrainingLog:
    """Train a model in place.

    Args:
        model: on the device where it shall be trained.
        samples: training images with truth.
        recipe: numbers of the run.
        classes: without "no object".
        task: "semantic" or "panoptic": what the segments are.
        pretrained_backbone: trains the backbone at its own rate.
        on_step: called after each step with the number of steps done and the total loss.

    Raises:
        DivergedError: the loss is not finite.
    """
    device = next(model.parameters()).device
    criterion = Criterion(classes=classes, points=recipe.points).to(device)
    optimizer = make_optimizer(model, recipe, pretrained_backbone=pretrained_backbone)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.rate)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.manual_seed(recipe.seed)
    model.train()
    started, losses = time.perf_counter(), []
    for step, batch in zip(range(1, recipe.steps + 1), batches(samples, recipe), strict=False):
        images, targets = collate(batch, task)
        loss = criterion.total(
            criterion(model(images.to(device, memory_format=torch.channels_last)), [target.to(device) for target in targets])
        )
        if not loss.isfinite():
            raise DivergedError(
                f"loss is {loss.item()} at step {step} of {recipe.steps}: training has diverged; try a smaller learning rate"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, recipe.clip_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        on_step(step, losses[-1])
    return TrainingLog(losses, time.perf_counter() - started)
