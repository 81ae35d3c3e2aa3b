"""Panoptic quality against a loop over pairs of segments."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from emca_bench.data import Segment
from emca_bench.evaluate.panoptic import PanopticScore

THINGS = (True, True, True, False, False)


def random_map(rng: np.random.Generator, *, crowds: bool) -> tuple[np.ndarray, list[Segment]]:
    """Rectangles over void, of random classes; big ids, as RGB-encoded maps have them."""
    ids = np.zeros((int(rng.integers(1, 24)), int(rng.integers(1, 24))), np.int64)
    found = {}
    for _ in range(int(rng.integers(0, 9))):
        y, x = (int(rng.integers(0, side)) for side in ids.shape)
        category = int(rng.integers(0, len(THINGS)))
        segment = Segment(int(rng.integers(1, 2**24)), category, THINGS[category], crowds and THINGS[category] and rng.random() < 0.3)
        ids[y : y + int(rng.integers(1, 20)), x : x + int(rng.integers(1, 20))] = segment.id
        found[segment.id] = segment
    left = set(np.unique(ids).tolist())
    return ids, [segment for segment in found.values() if segment.id in left]


def disturbed(rng: np.random.Generator, ids: np.ndarray, segments: list[Segment]) -> tuple[np.ndarray, list[Segment]]:
    """The truth shifted by a pixel or so, some of it lost, some classes wrong: many matches, some misses."""
    moved = np.roll(ids, tuple(rng.integers(-1, 2, 2)), (0, 1)) * (rng.random(ids.shape) > 0.1)
    kept = [segment for segment in segments if rng.random() < 0.9]
    moved[~np.isin(moved, [segment.id for segment in kept])] = 0
    left = set(np.unique(moved).tolist())
    classes = {segment.id: segment.category if rng.random() < 0.8 else int(rng.integers(0, len(THINGS))) for segment in kept}
    return moved, [Segment(entry.id, classes[entry.id], THINGS[classes[entry.id]]) for entry in kept if entry.id in left]


def loop_oracle(images) -> dict[int, tuple[float, int, int, int]]:
    """IoU sum, TP, FP, FN per class, one pair at a time with masks."""
    iou_sum, tp, fp, fn = Counter(), Counter(), Counter(), Counter()
    for truth_map, truth, prediction_map, prediction in images:
        void = truth_map == 0
        hit = set()
        for one in truth:
            for other in prediction:
                if one.category != other.category or one.iscrowd:
                    continue
                mine, theirs = truth_map == one.id, prediction_map == other.id
                union = (mine | theirs).sum() - (theirs & void).sum()
                iou = (mine & theirs).sum() / union
                if iou > 0.5:
                    iou_sum[one.category] += iou
                    tp[one.category] += 1
                    hit |= {("truth", one.id), ("prediction", other.id)}
        for one in truth:
            if not one.iscrowd and ("truth", one.id) not in hit:
                fn[one.category] += 1
        for other in prediction:
            if ("prediction", other.id) in hit:
                continue
            theirs = prediction_map == other.id
            crowds = [one for one in truth if one.iscrowd and one.category == other.category]
            excused = (theirs & void).sum() + (theirs & (truth_map == crowds[-1].id)).sum() if crowds else (theirs & void).sum()
            if excused / theirs.sum() <= 0.5:
                fp[other.category] += 1
    return {category: (iou_sum[category], tp[category], fp[category], fn[category]) for category in range(len(THINGS))}


@pytest.mark.parametrize("crowds", [False, True])
def test_counts_and_quality_equal_a_loop_over_pairs(seed: int, crowds: bool):
    rng = np.random.default_rng(seed)
    score, images = PanopticScore(THINGS), []
    for index in range(60):
        ids, segments = random_map(rng, crowds=crowds)
        if index % 4 == 3:
            other = np.zeros_like(ids), []
            unrelated, theirs = random_map(rng, crowds=False)
            other = (unrelated, theirs) if unrelated.shape == ids.shape else other
        else:
            other = disturbed(rng, ids, segments)
        images.append((ids, segments, *other))
        score.add(*images[-1])
    expected = loop_oracle(images)
    for category, (iou, tp, fp, fn) in expected.items():
        assert (score.tp[category], score.fp[category], score.fn[category]) == (tp, fp, fn)
        assert score.iou[category] == pytest.approx(iou, abs=1e-12)
    for group, members in (("all", range(5)), ("things", range(3)), ("stuff", range(3, 5))):
        present = [expected[category] for category in members if sum(expected[category][1:])]
        assert score.pq(group) == pytest.approx(np.mean([iou / (tp + fp / 2 + fn / 2) for iou, tp, fp, fn in present]))
        assert score.sq(group) == pytest.approx(np.mean([iou / tp if tp else 0 for iou, tp, fp, fn in present]))
        assert score.rq(group) == pytest.approx(np.mean([tp / (tp + fp / 2 + fn / 2) for iou, tp, fp, fn in present]))
    assert score.class_pq() == pytest.approx(score.class_sq() * score.class_rq(), nan_ok=True)


def test_truth_as_prediction_is_perfect(seed: int):
    rng = np.random.default_rng(seed)
    score = PanopticScore(THINGS)
    for _ in range(40):
        ids, segments = random_map(rng, crowds=False)
        score.add(ids, segments, ids, segments)
    assert [score.pq(), score.sq("things"), score.rq("stuff")] == pytest.approx([1, 1, 1])
    assert not score.fp.any()
    assert not score.fn.any()


def test_what_lies_in_void_or_in_a_crowd_of_its_class_is_no_false_positive():
    truth = np.array([[0, 0, 5, 5, 5, 7, 7, 7]])
    segments = [Segment(5, 0, True, iscrowd=True), Segment(7, 1, True)]
    prediction = np.array([[1, 1, 1, 2, 2, 3, 0, 0]])

    def false_positives(classes: tuple[int, int, int]) -> list[int]:
        score = PanopticScore(THINGS)
        score.add(truth, segments, prediction, [Segment(id, category, True) for id, category in enumerate(classes, start=1)])
        return score.fp.tolist()

    # 1 lies by two thirds in void, 2 in the crowd, 3 in a thing of class 1 of which it covers a third
    assert false_positives((2, 0, 1)) == [0, 1, 0, 0, 0]
    assert false_positives((2, 1, 2)) == [0, 1, 1, 0, 0]


def test_a_crowd_is_not_asked_for_and_never_matched():
    ids = np.full((3, 3), 9)
    score = PanopticScore(THINGS)
    score.add(ids, [Segment(9, 0, True, iscrowd=True)], ids, [Segment(9, 0, True)])
    assert (score.tp[0], score.fp[0], score.fn[0]) == (0, 0, 0)
    assert np.isnan(score.pq())


def test_a_half_is_no_match_and_exactly_a_half_in_void_no_excuse():
    score = PanopticScore(THINGS)
    score.add(np.array([[1, 1]]), [Segment(1, 0, True)], np.array([[2, 0]]), [Segment(2, 0, True)])
    assert (score.tp[0], score.fp[0], score.fn[0]) == (0, 1, 1)
    score.add(np.array([[0, 1]]), [Segment(1, 1, True)], np.array([[2, 2]]), [Segment(2, 2, True)])
    assert (score.fp[2], score.fn[1]) == (1, 1)


def test_bad_input_is_named():
    score, ids = PanopticScore(THINGS), np.array([[0, 4]])
    with pytest.raises(ValueError, match=r"\[1, 1\].*\[1, 2\]"):
        score.add(ids, [Segment(4, 0, True)], np.zeros((1, 1), int), [])
    with pytest.raises(ValueError, match="truth has pixels of segment 4"):
        score.add(ids, [], ids, [])
    with pytest.raises(ValueError, match="prediction lists segment 3, which has no pixel"):
        score.add(ids, [Segment(4, 0, True)], ids, [Segment(4, 0, True), Segment(3, 0, True)])
    with pytest.raises(ValueError, match=r"classes 0\.\.5 where 0\.\.4"):
        score.add(np.array([[1, 4]]), [Segment(4, 5, True), Segment(1, 0, True)], ids, [])
    with pytest.raises(ValueError, match="twice"):
        score.add(ids, [Segment(4, 0, True), Segment(4, 1, True)], ids, [])
    assert not score.tp.any()
