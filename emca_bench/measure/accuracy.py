"""Accuracy of a cell: train its arm, evaluate on the test split, keep a few predictions to look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from emca_bench.data import Dataset, Sample, open_dataset
from emca_bench.evaluate.semantic import SemanticScore
from emca_bench.inference import semantic
from emca_bench.measure.subjects import ImpossibleError, model_overrides
from emca_bench.models import build_model
from emca_bench.models.mask2former import Mask2Former
from emca_bench.records import write_atomically
from emca_bench.specs import Arm, canonical_json, parse_size
from emca_bench.train import Recipe, train

SHOWN_IMAGES = 4
"""Test images whose predictions are kept, spread over the split."""

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
    name, seed = str(params["dataset"]), int(params["seed"])
    training, test = (
        load_split(name, "train", int(params.get("train_images", 0))),
        load_split(name, "test", int(params.get("test_images", 0))),
    )
    dataset = open_dataset(name, "test")
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
        task="semantic",
        pretrained_backbone=model.backbone.pretrained,
        on_step=lambda step, loss: on_progress(step, total, f"training step {step}/{recipe.steps}, loss {loss:.1f}"),
    )
    score = evaluate(
        model,
        test,
        classes=len(dataset.classes),
        shown=artifacts / "predictions" / key,
        on_image=lambda done: on_progress(recipe.steps + done, total, f"testing image {done}/{len(test)}"),
    )
    write_shown_images(dataset, test, artifacts / name)
    floor = score.always(commonest_class(training, len(dataset.classes)))
    kept = np.unique(np.linspace(0, recipe.steps - 1, KEPT_LOSSES).round().astype(int))
    return {
        "values": {
            "miou": 100 * score.miou(),
            "class_iou": {info.name: _percent(iou) for info, iou in zip(dataset.classes, score.class_iou(), strict=True)},
            "pixel_accuracy": 100 * score.pixel_accuracy(),
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


def evaluate(model: Mask2Former, test: list[Sample], *, classes: int, shown: Path, on_image: Callable[[int], None]) -> SemanticScore:
    """Score the label maps of all test images at their own resolution, and keep some of them as 8-bit PNG."""
    device = next(model.parameters()).device
    model.eval()
    score = SemanticScore(classes)
    numbers = {index: number for number, index in enumerate(shown_indices(len(test)))}
    with torch.inference_mode():
        for index, sample in enumerate(test):
            # a permuted view of an RGB image is already channels-last
            image = torch.from_numpy(sample.image.copy())[None].permute(0, 3, 1, 2).float().to(device)
            labels: npt.NDArray[np.uint8] = semantic(model(image), sample.size)[0].cpu().numpy().astype(np.uint8)
            score.add(sample.semantic, labels)
            if index in numbers:
                _write_png(shown / f"{numbers[index]:02}.png", labels)
            on_image(index + 1)
    return score


def shown_indices(count: int) -> list[int]:
    """Test images that are kept to look at, spread over the split."""
    return sorted({int(position) for position in np.linspace(0, count - 1, min(SHOWN_IMAGES, count)).round()})


def write_shown_images(dataset: Dataset, test: list[Sample], folder: Path) -> None:
    """Image and truth of the shown test images, and the classes with their colours: what overlays are painted from."""
    classes = [{"name": info.name, "thing": info.thing, "color": list(info.color)} for info in dataset.classes]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "classes.json", canonical_json(classes))
    for number, index in enumerate(shown_indices(len(test))):
        _write_png(folder / f"{number:02}" / "image.png", test[index].image)
        _write_png(folder / f"{number:02}" / "truth.png", test[index].semantic)


@lru_cache(maxsize=4)
def load_split(name: str, split: str, limit: int) -> list[Sample]:
    """The samples of a split in memory; the first `limit` of them, 0 for all."""
    dataset = open_dataset(name, split)
    return [dataset[index] for index in range(min(len(dataset), limit or len(dataset)))]


def commonest_class(samples: list[Sample], classes: int) -> int:
    """The class with most pixels."""
    counts = sum(np.bincount(sample.semantic.ravel(), minlength=256)[:classes] for sample in samples)
    return int(np.argmax(counts))


def _percent(share: float) -> float | None:
    return None if np.isnan(share) else 100 * float(share)


def _write_png(path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
