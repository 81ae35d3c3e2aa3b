from __future__ import annotations

import numpy as np
import pytest

from emca_bench.evaluate.semantic import SemanticScore


def brute_force_iou(truth: np.ndarray, prediction: np.ndarray, label: int) -> float:
    scored = truth != 255
    union = (((truth == label) | (prediction == label)) & scored).sum()
    return float((((truth == label) & (prediction == label)) & scored).sum() / union) if union else float("nan")


def test_scores_equal_counting_by_hand(seed: int):
    rng = np.random.default_rng(seed)
    truths = rng.choice([0, 1, 2, 3, 255], size=(3, 17, 13)).astype(np.uint8)
    predictions = rng.integers(0, 5, size=(3, 17, 13))
    score = SemanticScore(5)
    for truth, prediction in zip(truths, predictions, strict=True):
        score.add(truth, prediction)
    expected = [brute_force_iou(truths, predictions, label) for label in range(5)]
    assert score.class_iou() == pytest.approx(expected, nan_ok=True)
    # class 4 is predicted but never true: it has an IoU of zero and no part in the mean
    assert score.miou() == pytest.approx(np.mean(expected[:4]))
    scored = truths != 255
    assert score.pixel_accuracy() == pytest.approx((truths == predictions)[scored].mean())


def test_truth_as_prediction_is_perfect(seed: int):
    truth = np.random.default_rng(seed).integers(0, 3, size=(9, 9)).astype(np.uint8)
    score = SemanticScore(7)
    score.add(truth, truth)
    assert score.miou() == 1
    assert np.isnan(score.class_iou()[3:]).all()


def test_constant_prediction_is_scored_from_the_same_pixels():
    truth = np.array([[0, 0, 1, 255]], dtype=np.uint8)
    score = SemanticScore(2)
    score.add(truth, np.array([[1, 1, 0, 0]]))
    assert score.miou() == 0
    assert score.always(0).class_iou() == pytest.approx([2 / 3, 0])
    assert score.always(0).pixel_accuracy() == pytest.approx(2 / 3)


def test_sizes_and_classes_out_of_range_are_refused():
    score = SemanticScore(2)
    with pytest.raises(ValueError, match=r"\[2, 2\].*\[2, 3\]"):
        score.add(np.zeros((2, 3), np.uint8), np.zeros((2, 2), np.int64))
    with pytest.raises(ValueError, match="class 2"):
        score.add(np.full((1, 1), 2, np.uint8), np.zeros((1, 1), np.int64))


def test_nothing_scored_is_not_a_number():
    score = SemanticScore(2)
    score.add(np.full((2, 2), 255, np.uint8), np.zeros((2, 2), np.int64))
    assert np.isnan(score.miou())
    assert np.isnan(score.pixel_accuracy())
