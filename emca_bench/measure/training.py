"""The training of a cell: its data, its model and its recipe, in one process or in those of torchrun."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import Subset

from emca_bench.data import Dataset, Sample, open_dataset
from emca_bench.environment import source_hash
from emca_bench.errors import UsageError
from emca_bench.measure.subjects import model_overrides
from emca_bench.models import build_model
from emca_bench.models.mask2former import Mask2Former
from emca_bench.specs import RECIPE_NUMBERS, Arm, parse_size
from emca_bench.train import Files, Processes, Recipe, TrainingLog, make_recipe, train
from emca_bench.train.feed import Samples


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training leaves."""

    model: Mask2Former
    recipe: Recipe
    log: TrainingLog
    images: Samples
    data: str
    """Fingerprint of the training split."""


def recipe_of(params: Mapping[str, Any]) -> Recipe:
    """The recipe of a cell: a named one, "short" by default, with the numbers that the cell sets."""
    numbers = {name: params[name] for name in RECIPE_NUMBERS if name in params}
    return make_recipe(str(params.get("recipe", "short")), crop=parse_size(str(params["image_size"])), **numbers)


def train_cell(
    arm: Arm,
    params: Mapping[str, Any],
    *,
    checkpoint: Path | None = None,
    tensorboard: Path | None = None,
    processes: Processes | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Trained:
    """Train the arm of a cell, or go on with what a checkpoint holds.

    Args:
        arm: the contender.
        params: the cell's parameters.
        checkpoint: file of the training's state.
        tensorboard: folder for curves.
        processes: of a distributed training.
        on_step: called with the number of steps done and the loss.

    Raises:
        UsageError: the checkpoint is of another configuration, data or source.
    """
    name, seed = str(params["dataset"]), int(params["seed"])
    processes = processes or Processes(str(params.get("device", "cpu")))
    dataset = open_dataset(name, "train")
    model, overrides = built_model(arm, params, classes=len(dataset.classes), device=processes.device)
    workers = int(params.get("loader_workers", 0))
    images = training_images(params)
    recipe = recipe_of(params)
    built = {"name": params["model"], **overrides}
    data = dataset.fingerprint()
    identity = {"arm": arm.name, "model": built, "data": data, "source": source_hash()}
    log = train(
        model,
        images,
        recipe,
        classes=len(dataset.classes),
        task=str(params.get("task", "semantic")),
        pretrained_backbone=model.backbone.pretrained,
        label=f"{arm.name} on {name}, seed {seed}",
        workers=workers,
        files=Files(checkpoint=checkpoint, seconds=checkpoint_seconds(), identity=identity, tensorboard=tensorboard),
        processes=processes,
        on_step=on_step,
    )
    return Trained(model=model, recipe=recipe, log=log, images=images, data=data)


def built_model(arm: Arm, params: Mapping[str, Any], *, classes: int, device: torch.device) -> tuple[Mask2Former, dict[str, Any]]:
    """The model of a cell as its seed makes it, on a device, and what it was built with."""
    torch.manual_seed(int(params["seed"]))
    overrides = model_overrides(arm, params)
    model = build_model(str(params["model"]), num_classes=classes, **overrides)
    return model.to(device).to(memory_format=torch.channels_last), overrides  # type: ignore[call-overload]


def checkpoint_seconds() -> float:
    """Time between two checkpoints: a minute, or EMCA_CHECKPOINT_SECONDS."""
    found = os.environ.get("EMCA_CHECKPOINT_SECONDS", "60")
    try:
        return float(found)
    except ValueError:
        raise UsageError(f"EMCA_CHECKPOINT_SECONDS={found!r}; expected a number of seconds") from None


def training_images(params: Mapping[str, Any]) -> Samples:
    """The training images of a cell: in memory, or where loader processes read them, on disk."""
    name, limit = str(params["dataset"]), int(params.get("train_images", 0))
    if not int(params.get("loader_workers", 0)):
        return load_split(name, "train", limit)
    return first_samples(open_dataset(name, "train"), limit)


def first_samples(dataset: Dataset, limit: int) -> Samples:
    """The first images of a data set, 0 for all, read when they are asked for."""
    if not 0 < limit < len(dataset):
        return dataset
    # a subset has what is needed: a length, and samples by index
    return cast(Samples, Subset(cast(Any, dataset), range(limit)))


@lru_cache(maxsize=4)
def load_split(name: str, split: str, limit: int) -> list[Sample]:
    """The samples of a split in memory; the first `limit` of them, 0 for all."""
    dataset = open_dataset(name, split)
    return [dataset[index] for index in range(min(len(dataset), limit or len(dataset)))]
