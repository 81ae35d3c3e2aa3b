"""Average precision against pycocotools on the same masks."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from emca_bench.data import Segment
from emca_bench.evaluate.instances import InstanceScore, thing_masks

CLASSES = 4
Image = dict[str, Any]


def random_masks(rng: np.random.Generator, count: int, size: tuple[int, int]) -> np.ndarray:
    masks = np.zeros((count, *size), bool)
    for mask in masks:
        # sides up to the whole image, so that every area range is met
        height, width = (int(np.exp(rng.uniform(0, np.log(side)))) for side in size)
        y, x = (int(rng.integers(0, side)) for side in size)
        mask[y : y + height, x : x + width] = True
    return masks


def random_image(rng: np.random.Generator) -> Image:
    """Truth with crowds, and predictions of all kinds: good, bad, duplicated, empty, with equal scores."""
    size = (150, 170)
    wanted = int(rng.integers(0, 7))
    truth, categories = random_masks(rng, wanted, size), rng.integers(0, CLASSES, wanted)
    picked = rng.integers(0, wanted, int(rng.integers(0, 9))) if wanted else np.zeros(0, int)
    near = np.array([np.roll(truth[index], rng.integers(-3, 4, 2), (0, 1)) for index in picked]).reshape(-1, *size)
    masks = np.concatenate([near, near[:3], random_masks(rng, int(rng.integers(0, 5)), size), np.zeros((1, *size), bool)])
    guessed = rng.integers(0, CLASSES, len(masks))
    guessed[: len(picked)] = np.where(rng.random(len(picked)) < 0.8, categories[picked], guessed[: len(picked)])
    scores = rng.choice(np.linspace(0, 1, 7), len(masks))
    return {
        "truth": truth,
        "truth_categories": categories,
        "iscrowd": rng.random(wanted) < 0.2,
        "masks": masks,
        "categories": guessed,
        "scores": scores,
    }


def ours(images: list[Image]) -> InstanceScore:
    score = InstanceScore(CLASSES)
    for image in images:
        arguments = (image[name] for name in ("truth", "truth_categories", "masks", "categories", "scores"))
        score.add(*arguments, iscrowd_G=image["iscrowd"])
    return score


def theirs(images: list[Image]) -> COCOeval:
    def encoded(mask: np.ndarray) -> dict[str, Any]:
        return rle.encode(np.asfortranarray(mask, dtype=np.uint8))

    truth, results = [], []
    for number, image in enumerate(images, start=1):
        for mask, category, crowd in zip(image["truth"], image["truth_categories"], image["iscrowd"], strict=True):
            entry = {"id": len(truth) + 1, "image_id": number, "category_id": int(category) + 1, "iscrowd": int(crowd)}
            truth.append({**entry, "segmentation": encoded(mask), "area": int(mask.sum()), "bbox": [0, 0, 1, 1]})
        for mask, category, score in zip(image["masks"], image["categories"], image["scores"], strict=True):
            entry = {"image_id": number, "category_id": int(category) + 1, "score": float(score)}
            results.append({**entry, "segmentation": encoded(mask)})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": number, "height": 150, "width": 170} for number in range(1, len(images) + 1)],
            "categories": [{"id": category + 1, "name": str(category)} for category in range(CLASSES)],
            "annotations": truth,
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("count", [1, 40])
def test_ap_equals_pycocotools(seed: int, count: int):
    rng = np.random.default_rng(seed)
    images = [random_image(rng) for _ in range(count)]
    score, evaluation = ours(images), theirs(images)
    found = [score.ap(), score.ap(iou=0.5), score.ap(iou=0.75), *(score.ap(area=area) for area in ("small", "medium", "large"))]
    expected = [value if value > -1 else np.nan for value in evaluation.stats[:6]]
    assert found == pytest.approx(expected, abs=1e-9, nan_ok=True)
    precision = evaluation.eval["precision"][:, :, :, 0, 2].mean((0, 1))
    assert score.class_ap() == pytest.approx(np.where(precision > -1, precision, np.nan), abs=1e-9, nan_ok=True)


def test_more_than_a_hundred_predictions_of_a_class_are_cut_as_pycocotools_does(seed: int):
    rng = np.random.default_rng(seed)
    image = random_image(rng)
    truth = random_masks(rng, 3, (150, 170))
    masks = np.concatenate([random_masks(rng, 150, (150, 170)), truth])
    image |= {"truth": truth, "truth_categories": np.zeros(3, int), "iscrowd": np.zeros(3, bool)}
    for last in (0.0, 1.0):
        scores = np.append(rng.uniform(0.1, 0.9, 150), [last] * 3)
        image |= {"masks": masks, "categories": np.zeros(len(masks), int), "scores": scores}
        assert ours([image]).ap() == pytest.approx(theirs([image]).stats[0], abs=1e-9)


def test_of_truths_that_fit_equally_well_the_last_is_taken(seed: int):
    def columns(*ranges: tuple[int, int]) -> np.ndarray:
        masks = np.zeros((len(ranges), 150, 170), bool)
        for mask, (low, high) in zip(masks, ranges, strict=True):
            mask[:40, low:high] = True
        return masks

    image = random_image(np.random.default_rng(seed))
    image |= {"truth": columns((0, 10), (2, 12)), "truth_categories": np.zeros(2, int), "iscrowd": np.zeros(2, bool)}
    # the first fits both alike, the second is the last of them exactly
    image |= {"masks": columns((1, 11), (2, 12)), "categories": np.zeros(2, int), "scores": np.array([0.9, 0.8])}
    assert ours([image]).ap() == pytest.approx(theirs([image]).stats[0], abs=1e-9)


def test_truth_as_prediction_is_perfect(seed: int):
    rng = np.random.default_rng(seed)
    images = [random_image(rng) for _ in range(20)]
    for image in images:
        image |= {"masks": image["truth"], "categories": image["truth_categories"], "scores": rng.random(len(image["truth"]))}
        image |= {"iscrowd": np.zeros(len(image["truth"]), bool)}
    score = ours(images)
    assert [score.ap(), score.ap(iou=0.95)] == pytest.approx([1, 1])


def test_nothing_predicted_scores_zero_and_no_truth_is_not_a_number():
    score, none = InstanceScore(CLASSES), np.zeros((0, 5, 5), bool)
    score.add(none, [], np.ones((1, 5, 5), bool), [1], [0.5])
    assert np.isnan(score.ap())
    score.add(np.ones((1, 5, 5), bool), [2], none, [], [])
    assert score.ap() == 0
    assert np.isnan(score.class_ap()).tolist() == [True, True, False, True]


def test_stated_areas_decide_the_range():
    mask = np.ones((1, 10, 10), bool)
    score = InstanceScore(CLASSES)
    score.add(mask, [0], mask, [0], [1.0], areas_G=[5000])
    assert score.ap(area="medium") == pytest.approx(1)
    assert np.isnan(score.ap(area="small"))


def test_things_of_a_panoptic_truth():
    ids = np.array([[3, 3, 0], [8, 9, 9]])
    segments = [Segment(3, 1, True), Segment(8, 2, False), Segment(9, 0, True, iscrowd=True)]
    masks, categories, iscrowd = thing_masks(ids, segments)
    assert masks.sum((1, 2)).tolist() == [2, 2]
    assert categories.tolist() == [1, 0]
    assert iscrowd.tolist() == [False, True]
    assert thing_masks(ids, segments[1:2])[0].shape == (0, 2, 3)


def test_bad_input_is_named():
    score, mask = InstanceScore(CLASSES), np.ones((1, 2, 2), bool)
    with pytest.raises(ValueError, match=r"predictions: masks have shape \[1, 2, 2\]"):
        score.add(mask, [0], mask, [0, 1], [0.5])
    with pytest.raises(ValueError, match=r"predictions are \[3, 2\], their truth \[2, 2\]"):
        score.add(mask, [0], np.ones((1, 3, 2), bool), [0], [0.5])
    with pytest.raises(ValueError, match=r"truth: class 4 where 0\.\.3"):
        score.add(mask, [4], mask, [0], [0.5])
    with pytest.raises(ValueError, match=r"IoU threshold 0.6\d"):
        score.ap(iou=0.63)


def test_pycocotools_is_not_needed():
    code = "import sys; sys.modules['pycocotools'] = None; import emca_bench.evaluate.instances, emca_bench.evaluate.panoptic"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=os.environ).returncode == 0
