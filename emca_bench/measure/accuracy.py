"""Accuracy of a cell: train its arm, evaluate on the test split, keep a few predictions to look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emca_bench.data import open_dataset
from emca_bench.errors import UsageError
from emca_bench.evaluate.diagnostics import diagnose
from emca_bench.measure.evaluation import Evaluation, PanopticRules, evaluate, write_shown_images
from emca_bench.measure.inputs import ImpossibleError
from emca_bench.measure.training import Trained, first_samples, load_split, recipe_of, train_cell
from emca_bench.models.checkpoints import write_tensors
from emca_bench.specs import Arm
from emca_bench.train.feed import Samples

KEPT_LOSSES = 128
"""Points of the loss curve that a record keeps."""

COUNTED_IMAGES = 1000
"""Training images among which the commonest class is looked for."""

WEIGHTS = "weights"
"""Folder of a run for trained weights, where a study keeps them."""

OnProgress = Callable[[int, int, str], None]


def measure_accuracy(
    arm: Arm, params: Mapping[str, Any], *, key: str, artifacts: Path, on_progress: OnProgress, checkpoint: Path | None = None
) -> dict[str, Any]:
    """Train and evaluate.

    Args:
        arm: the contender.
        params: the cell's parameters.
        key: of the cell, names its folder of predictions.
        artifacts: folder for predictions and shown images.
        on_progress: called with (done, total, what is going on).
        checkpoint: where the training keeps its state, and goes on from it.

    Returns:
        {"values": ..., "samples": ...} of the record; accuracies in 0..100.
    """
    if str(params.get("device", "cpu")) == "cuda" and not torch.cuda.is_available():
        raise ImpossibleError("no CUDA device")
    name, split = str(params["dataset"]), evaluated_split(params)
    dataset, test = open_dataset(name, split), evaluated_images(params)
    rules = panoptic_rules(params)
    steps = int(params["steps"])
    total = steps + len(test)
    trained = train_cell(
        arm,
        params,
        checkpoint=checkpoint,
        on_step=lambda step, loss: on_progress(step, total, f"training step {step}/{steps}, loss {loss:.1f}"),
    )
    if params.get("keep_weights"):
        folder = artifacts.parent / WEIGHTS
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(trained.model.state_dict(), folder / f"{key}.safetensors")
    scores = Evaluation(dataset.classes, rules)
    evaluate(
        trained.model,
        test,
        scores,
        shown=artifacts / "predictions" / key,
        on_image=lambda done: on_progress(steps + done, total, f"testing image {done}/{len(test)}"),
    )
    write_shown_images(dataset, test, artifacts / name, segments=rules is not None)
    return {
        "values": {
            **scores.values(),
            **_diagnostics(trained, params),
            **_floor(scores, trained.images, len(dataset.classes)),
            **_training_values(trained, params),
            "test_images": len(test),
            "image_size": str(params["image_size"]),
            "data": dataset.fingerprint(),
            "train_data": trained.data,
        },
        "samples": _curve(trained.log.losses),
    }


def _diagnostics(trained: Trained, params: Mapping[str, Any]) -> dict[str, Any]:
    """What the decoder's layers do on validation images, where a cell asks for it."""
    wanted = int(params.get("diagnostic_images", 0))
    if not wanted:
        return {}
    validation = open_dataset(str(params["dataset"]), "val")
    chosen = sorted({int(index) for index in np.linspace(0, len(validation) - 1, min(wanted, len(validation))).round()})
    layers = diagnose(trained.model, (validation[index] for index in chosen), str(params.get("task", "semantic")))
    return {"diagnostics": layers, "diagnostic_images": len(chosen)}


def _floor(scores: Evaluation, images: Samples, classes: int) -> dict[str, float]:
    """What always saying the commonest class scores."""
    floor = scores.semantic.always(commonest_class(images, classes))
    return {"frequency_miou": 100 * floor.miou(), "frequency_pixel_accuracy": 100 * floor.pixel_accuracy()}


def _training_values(trained: Trained, params: Mapping[str, Any]) -> dict[str, Any]:
    log, recipe = trained.log, trained.recipe
    started_from = "frozen ImageNet backbone" if params.get("frozen") else "ImageNet backbone"
    return {
        "train_seconds": log.seconds,
        "train_steps": recipe.steps,
        "train_images": len(trained.images),
        "resumed_at": log.resumed_at,
        "waiting_seconds": log.waiting_seconds,
        # of all loader processes together, were they never to wait
        "loader_images_per_second": recipe.steps * recipe.batch * max(1, int(params.get("loader_workers", 0))) / log.loading_seconds,
        "parameters": sum(parameter.numel() for parameter in trained.model.parameters()),
        "final_loss": float(np.mean(log.losses[-max(1, recipe.steps // 20) :])),
        "pretrained": started_from if trained.model.backbone.pretrained else None,
    }


def _curve(losses: Sequence[float]) -> dict[str, list[float]]:
    kept = np.unique(np.linspace(0, len(losses) - 1, KEPT_LOSSES).round().astype(int))
    return {"loss_step": [float(step + 1) for step in kept], "loss": [losses[step] for step in kept]}


def evaluated_images(params: Mapping[str, Any]) -> Samples:
    """The images that a cell is evaluated on: in memory, or on disk where the training images are."""
    name, split, limit = str(params["dataset"]), evaluated_split(params), int(params.get("test_images", 0))
    if int(params.get("loader_workers", 0)):
        return first_samples(open_dataset(name, split), limit)
    return load_split(name, split, limit)


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
        UsageError: splits that cannot be opened or have other classes than the first, a panoptic task on data without panoptic truth, or a
            recipe that cannot be used.
    """
    recipe_of(params)
    looked_at = ["val"] if params.get("diagnostic_images") else []
    trained: list[str] | None = None
    for split in ("train", evaluated_split(params), *looked_at):
        dataset = open_dataset(str(params["dataset"]), split)
        names = [info.name for info in dataset.classes]
        trained = names if trained is None else trained
        for number, (found, expected) in enumerate(zip_longest(names, trained)):
            if found != expected:
                raise UsageError(
                    f"dataset {dataset.name!r}: class {number} of split {split!r} is {found!r}, expected {expected!r} as in 'train'"
                )
        if panoptic_rules(params) is not None and dataset[0].panoptic is None:
            raise UsageError(f"dataset {dataset.name!r} has semantic labels only; expected panoptic labels for the task 'panoptic'")


def commonest_class(images: Samples, classes: int) -> int:
    """The class with most pixels, in at most COUNTED_IMAGES images spread over all."""
    chosen = sorted({int(index) for index in np.linspace(0, len(images) - 1, min(len(images), COUNTED_IMAGES)).round()})
    counts = sum(np.bincount(images[index].semantic.ravel(), minlength=256)[:classes] for index in chosen)
    return int(np.argmax(counts))
