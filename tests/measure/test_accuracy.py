from __future__ import annotations

import errno
import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from emca_bench.data import Sample, open_dataset
from emca_bench.environment import source_hash
from emca_bench.errors import UsageError
from emca_bench.measure import accuracy, evaluation, worker
from emca_bench.measure.accuracy import check_data, measure_accuracy
from emca_bench.measure.evaluation import shown_indices
from emca_bench.measure.training import train_cell
from emca_bench.models import build_model, load_checkpoint
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


def measure(folder: Path, attention: str = "emca", **changes: object) -> dict[str, dict[str, Any]]:
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


PANOPTIC = {"task": "panoptic", "object_threshold": 0.1, "overlap_threshold": 0.3}


def test_one_model_gives_all_three_results_without_a_change_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[int, dict[str, torch.Tensor]]] = []
    original = evaluation.Evaluation.add

    def noting(self, sample, predictions):
        results = original(self, sample, predictions)
        assert results.panoptic is not None
        assert results.instances is not None
        return results

    monkeypatch.setattr(evaluation.Evaluation, "add", noting)

    def watched(model, test, scores, **options):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        evaluation.evaluate(model, test, scores, **options)
        seen.append((len(test), {name: value for name, value in model.state_dict().items() if not torch.equal(value, before[name])}))

    monkeypatch.setattr(accuracy, "evaluate", watched)
    values = measure(tmp_path, **PANOPTIC, steps=30, train_images=2)["values"]
    assert seen == [(3, {})]
    for name in ("miou", "pq", "sq", "rq", "pq_things", "pq_stuff", "ap", "ap50", "ap75", "ap_small"):
        assert values[name] is None or 0 <= values[name] <= 100
    classes = open_dataset("scenes", "test").classes
    assert set(values["class_pq"]) == set(values["class_ap"]) == {info.name for info in classes}
    assert all(values["class_ap"][info.name] is None for info in classes if not info.thing)
    found = [value for value in values["class_pq"].values() if value is not None]
    assert values["pq"] == pytest.approx(np.mean(found))


def test_a_test_image_without_objects_changes_no_score(tmp_path: Path, unlabelled: Callable[[Sample], Sample]):
    """Nothing of it is scored; of test images without any label nothing can be said."""
    scenes = open_dataset("scenes", "test")
    model = build_model("mask2former_tiny", num_classes=10)
    found = []
    for samples in ([scenes[0]], [scenes[0], unlabelled(scenes[1])]):
        scores = evaluation.Evaluation(scenes.classes, evaluation.PanopticRules(object_threshold=0.1, overlap_threshold=0.1))
        evaluation.evaluate(model, samples, scores, shown=tmp_path, on_image=lambda done: None)
        found.append(scores.values())
    assert {name: found[0][name] for name in ("miou", "pq", "pixel_accuracy")} == {
        name: found[1][name] for name in ("miou", "pq", "pixel_accuracy")
    }
    nothing = evaluation.Evaluation(scenes.classes, None)
    evaluation.evaluate(model, [unlabelled(scenes[1])], nothing, shown=tmp_path, on_image=lambda done: None)
    with pytest.raises(UsageError, match="the test images have no labelled pixel; expected at least one"):
        nothing.values()


def test_kept_segments_are_those_of_truth_and_results(tmp_path: Path):
    measure(tmp_path, **PANOPTIC, steps=30, train_images=2)
    test = open_dataset("scenes", "test")
    for number, index in enumerate(shown_indices(3)):
        sample = test[index]
        truth = np.asarray(Image.open(tmp_path / "scenes" / f"{number:02}" / "truth_panoptic.png")).astype(int)
        assert (truth[..., 0] == sample.semantic).all()
        assert len(np.unique(truth[..., 1] + 256 * truth[..., 2])) == len(np.unique(sample.panoptic))
        for kind in ("panoptic", "instances"):
            pixels = np.asarray(Image.open(tmp_path / "predictions" / "cell" / f"{number:02}_{kind}.png")).astype(int)
            assert pixels.shape == (*sample.size, 3)
            assert ((pixels[..., 0] == 255) == (pixels[..., 1] + pixels[..., 2] == 0)).all()


def test_the_thresholds_are_those_of_the_cell(tmp_path: Path):
    strict, lenient = (measure(tmp_path, **{**PANOPTIC, "object_threshold": threshold})["values"] for threshold in (1.0, 0.0))
    # nothing passes 1, so every thing and every stuff of the truth is missed
    assert strict["pq"] == 0
    assert strict["sq"] == 0
    assert (strict["miou"], strict["ap"]) == (lenient["miou"], lenient["ap"])
    assert lenient["pq"] >= 0


def test_semantic_records_have_nothing_of_the_other_task(tmp_path: Path):
    values = measure(tmp_path)["values"]
    assert not [name for name in values if name.startswith(("pq", "sq", "rq", "ap", "class_pq", "class_ap"))]
    assert not list(tmp_path.rglob("*_panoptic.png"))


def test_data_that_a_cell_cannot_use_is_named(tmp_path: Path):
    check_data({**PARAMS, **PANOPTIC})
    with pytest.raises(UsageError, match="unknown split 'testing' of dataset 'scenes'"):
        check_data({**PARAMS, "test_split": "testing"})
    for split in ("train", "test"):
        for kind in ("images", "annotations"):
            (tmp_path / "camvid" / kind / split).mkdir(parents=True)
        Image.new("RGB", (8, 6)).save(tmp_path / "camvid" / "images" / split / "a.jpg")
        Image.new("L", (8, 6)).save(tmp_path / "camvid" / "annotations" / split / "a.png")
    with pytest.MonkeyPatch.context() as context:
        context.setenv("EMCA_DATASETS", str(tmp_path))
        check_data({**PARAMS, "dataset": "camvid"})
        with pytest.raises(UsageError, match="dataset 'camvid' has semantic labels only; expected panoptic labels for the task 'panoptic'"):
            check_data({**PARAMS, **PANOPTIC, "dataset": "camvid"})


def test_another_split_is_evaluated_on_request(tmp_path: Path):
    measure(tmp_path, test_split="val", steps=1)
    kept = np.asarray(Image.open(tmp_path / "scenes" / "00" / "image.png"))
    assert (kept == open_dataset("scenes", "val")[0].image).all()


@pytest.mark.datasets
@pytest.mark.skipif(not os.environ.get("EMCA_DATASETS"), reason="EMCA_DATASETS is not set")
def test_one_model_on_real_facades(tmp_path: Path):
    sizes = {"image_size": "128x128", "steps": 40, "batch": 2, "train_images": 8, "test_images": 4}
    values = measure(tmp_path, "masked_fused", **{**PANOPTIC, **sizes}, dataset="facade", queries=64)["values"]
    assert values["test_images"] == 4
    assert values["miou"] > 0
    assert values["pq"] is not None
    assert values["ap"] is not None
    assert len(list((tmp_path / "predictions" / "cell").glob("*_instances.png"))) == 4


def test_loader_processes_give_the_same_cell(tmp_path: Path):
    in_memory, on_disk = (measure(tmp_path, steps=3, loader_workers=workers) for workers in (0, 2))
    assert in_memory["samples"] == on_disk["samples"]
    assert in_memory["values"]["class_iou"] == on_disk["values"]["class_iou"]
    for values in (in_memory["values"], on_disk["values"]):
        assert values["loader_images_per_second"] > 0
        assert 0 < values["waiting_seconds"] < values["train_seconds"]


def test_kept_weights_are_those_that_were_scored(tmp_path: Path):
    scored = measure(tmp_path / "artifacts", keep_weights=True, steps=3, ema=0.5)["values"]
    model = build_model("mask2former_tiny", num_classes=10, mask_source="features")
    load_checkpoint(model, tmp_path / "weights" / "cell.safetensors")
    scores = evaluation.Evaluation(open_dataset("scenes", "test").classes, None)
    test = accuracy.evaluated_images(PARAMS)
    evaluation.evaluate(model, test, scores, shown=tmp_path, on_image=lambda done: None)
    assert scores.values()["miou"] == pytest.approx(scored["miou"], abs=1e-6)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"recipe": "mask2fomer"}, "did you mean 'mask2former'"), ({"schedule": "step"}, "schedule"), ({"precision": "float16"}, "bfloat16")],
)
def test_a_recipe_that_cannot_be_used_is_named(tmp_path: Path, wrong: dict[str, str], words: str):
    with pytest.raises(UsageError, match=words):
        check_data({**PARAMS, **wrong})


def test_a_training_does_not_go_on_under_other_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    arm, checkpoint = Arm(name="emca", attention="emca"), tmp_path / "cell.pt"
    train_cell(arm, PARAMS, checkpoint=checkpoint)
    # where nothing changed, what is finished trains no step
    steps = []
    train_cell(arm, PARAMS, checkpoint=checkpoint, on_step=lambda step, loss: steps.append(step))
    assert steps in ([], [6])
    source = source_hash()
    monkeypatch.setattr("emca_bench.measure.training.source_hash", lambda: "0123456789ab")
    words = f"cell.pt is of another configuration: source is '{source}' there and '0123456789ab' here"
    with pytest.raises(UsageError, match=words):
        train_cell(arm, PARAMS, checkpoint=checkpoint)


def test_a_full_disk_ends_a_run_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every other cell would train in vain."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("emca_bench.train.state.write_atomically", full)
    monkeypatch.setenv("EMCA_CHECKPOINT_SECONDS", "0")
    request = {"do": "accuracy", "arm": asdict(Arm(name="emca", attention="emca")), "params": PARAMS, "key": "cell"}
    request |= {"artifacts": str(tmp_path), "checkpoint": str(tmp_path / "cell.pt")}
    answers: list[dict[str, Any]] = []
    worker.serve(io.StringIO(json.dumps(request) + "\n"), answers.append, threads=torch.get_num_threads(), device="cpu")
    assert answers[-1]["kind"] == "usage"
    assert re.search(r"checkpoint cell.pt of step 1 cannot be written: No space left on device; there is none yet", answers[-1]["message"])
