from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emca_bench.data import open_dataset
from emca_bench.measure.accuracy import measure_accuracy
from emca_bench.measure.evaluation import shown_indices
from emca_bench.models.matcher import DivergedError
from emca_bench.specs import Arm

PARAMS = {
    "model": "mask2former_tiny",
    "dataset": "scenes",
    "image_size": "64x64",
    "batch": 2,
    "steps": 6,
    "points": 64,
    "train_images": 8,
    "test_images": 3,
    "mask_source": "features",
    "seed": 0,
}


def measure(folder: Path, attention: str = "emca", **changes: object) -> dict[str, dict[str, object]]:
    arm = Arm(name=attention, attention=attention)
    return measure_accuracy(arm, {**PARAMS, **changes}, key="cell", artifacts=folder, on_progress=lambda done, total, text: None)


def test_one_cell_gives_scores_a_loss_curve_and_pictures(tmp_path: Path):
    told = []
    arm = Arm(name="emca", attention="emca")
    result = measure_accuracy(arm, PARAMS, key="cell", artifacts=tmp_path, on_progress=lambda done, total, text: told.append((done, total)))
    values = result["values"]
    assert 0 <= values["miou"] <= 100
    assert 0 < values["frequency_miou"] < values["frequency_pixel_accuracy"] < 100
    assert set(values["class_iou"]) == {info.name for info in open_dataset("scenes", "test").classes}
    assert result["samples"]["loss_step"] == [1, 2, 3, 4, 5, 6]
    assert told[-1] == (9, 9)
    classes = json.loads((tmp_path / "scenes" / "classes.json").read_text())
    assert len(classes) == 10
    test = open_dataset("scenes", "test")
    for number, index in enumerate(shown_indices(3)):
        truth = np.asarray(Image.open(tmp_path / "scenes" / f"{number:02}" / "truth.png"))
        prediction = np.asarray(Image.open(tmp_path / "predictions" / "cell" / f"{number:02}.png"))
        assert (truth == test[index].semantic).all()
        assert prediction.shape == truth.shape
        assert prediction.max() < 10


def test_the_same_seed_gives_the_same_losses_and_another_does_not(tmp_path: Path):
    one, again, other = (measure(tmp_path, seed=seed)["samples"]["loss"] for seed in (5, 5, 6))
    assert one == again
    assert one != other


def test_training_learns(tmp_path: Path):
    losses = measure(tmp_path, "masked_fused", steps=60, train_images=2, seed=1)["samples"]["loss"]
    assert isinstance(losses, list)
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


def test_divergence_is_said(tmp_path: Path):
    with pytest.raises(DivergedError, match="smaller learning rate"):
        measure(tmp_path, learning_rate=1e30)


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3]), (10, [0, 3, 6, 9])])
def test_shown_images_are_spread_over_the_split(count: int, expected: list[int]):
    assert shown_indices(count) == expected
