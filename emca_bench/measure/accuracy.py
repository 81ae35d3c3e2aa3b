"""Accuracy of a cell: train its arm, evaluate on the test split, keep a few predictions to look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emca_bench.data import Sample, open_dataset
from emca_bench.errors import UsageError
from emca_bench.measure.evaluation import Evaluation, PanopticRules, evaluate, write_shown_images
from emca_bench.measure.inputs import ImpossibleError
from emca_bench.measure.subjects import model_overrides
from emca_bench.models import build_model
from emca_bench.specs import Arm, parse_size
from emca_bench.train import Recipe, train

KEPT_LOSSES = 128
"""Points of the loss curve that a record keeps."""

OnProgress = Callable[[int, int, str], None]


def measure_accuracy(arm: Arm, params: Mapping[str, Any], *, key: str, artifacts: Path, on_progress: OnProgress) -> dict[str, Any]:
    """Train and evaluate.

    Args:
        arm: the contender.
        params: the cell's parameters.
        key: of the cell, names its folder of predictions.
        artifacts: folder for predictions and shown images.
        on_progress: called with (done, total, what is going on).

    Returns:
        {"values": ..., "samples": ...} of the record; accuracies in 0..100.
    """
    device = str(params.get("device", "cpu"))
    if device == "cuda" and not torch.cuda.is_available():
        raise ImpossibleError("no CUDA device")
    name, seed, split = str(params["dataset"]), int(params["seed"]), evaluated_split(params)
    training, test = (
        load_split(name, "train", int(params.get("train_images", 0))),
        load_split(name, split, int(params.get("test_images", 0))),
    )
    dataset = open_dataset(name, split)
    rules = panoptic_rules(params)
    torch.manual_seed(seed)
    model = build_model(str(params["model"]), num_classes=len(dataset.classes), **model_overrides(arm, params))
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    recipe = Recipe(
        steps=int(params["steps"]),
        batch=int(params["batch"]),
        crop=parse_size(str(params["image_size"])),
        learning_rate=float(params.get("learning_rate", 1e-3)),
        points=int(params.get("points", 1024)),
        seed=seed,
    )
    total = recipe.steps + len(test)
    log = train(
        model,
        training,
        recipe,
        classes=len(dataset.classes),
        task="semantic" if rules is None else "panoptic",
        pretrained_backbone=model.backbone.pretrained,
        on_step=lambda step, loss: on_progress(step, total, f"training step {step}/{recipe.steps}, loss {loss:.1f}"),
    )
    scores = Evaluation(dataset.classes, rules)
    evaluate(
        model,
        test,
        scores,
        shown=artifacts / "predictions" / key,
        on_image=lambda done: on_progress(recipe.steps + done, total, f"testing image {done}/{len(test)}"),
    )
    write_shown_images(dataset, test, artifacts / name, segments=rules is not None)
    floor = scores.semantic.always(commonest_class(training, len(dataset.classes)))
    kept = np.unique(np.linspace(0, recipe.steps - 1, KEPT_LOSSES).round().astype(int))
    return {
        "values": {
            **scores.values(),
            "frequency_miou": 100 * floor.miou(),
            "frequency_pixel_accuracy": 100 * floor.pixel_accuracy(),
            "train_seconds": log.seconds,
            "train_steps": recipe.steps,
            "train_images": len(training),
            "test_images": len(test),
            "image_size": str(params["image_size"]),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "final_loss": float(np.mean(log.losses[-max(1, recipe.steps // 20) :])),
            "pretrained": ("frozen ImageNet backbone" if params.get("frozen") else "ImageNet backbone")
            if model.backbone.pretrained
            else None,
            "data": dataset.fingerprint(),
        },
        "samples": {"loss_step": [float(step + 1) for step in kept], "loss": [log.losses[step] for step in kept]},
    }


def panoptic_rules(params: Mapping[str, Any]) -> PanopticRules | None:
    """The thresholds of a cell of task "panoptic"; None where the task is "semantic"."""
    if params.get("task", "semantic") == "semantic":
        return None
    return PanopticRules(**{name: params[name] for name in ("object_threshold", "overlap_threshold") if name in params})


def evaluated_split(params: Mapping[str, Any]) -> str:
    """The split that a cell is evaluated on."""
    return str(params.get("test_split", "test"))


def check_data(params: Mapping[str, Any]) -> None:
    """Complain about data that cannot be used before anything is trained.

    Raises:
        UsageError: splits that cannot be opened, or a panoptic task on data without panoptic truth.
    """
    for split in ("train", evaluated_split(params)):
        dataset = open_dataset(str(params["dataset"]), split)
        if panoptic_rules(params) is not None and dataset[0].panoptic is None:
            raise UsageError(f"dataset {dataset.name!r} has semantic labels only; expected panoptic labels for the task 'panoptic'")


@lru_cache(maxsize=4)
def load_split(name: str, split: str, limit: int) -> list[Sample]:
    """The samples of a split in memory; the first `limit` of them, 0 for all."""
    dataset = open_dataset(name, split)
    return [dataset[index] for index in range(min(len(dataset), limit or len(dataset)))]


def commonest_class(samples: list[Sample], classes: int) -> int:
    """The class with most pixels."""
    counts = sum(np.bincount(sample.semantic.ravel(), minlength=256)[:classes] for sample in samples)
    return int(np.argmax(counts))
