"""Matching against every permutation."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from emca_bench.models import Predictions, matcher
from emca_bench.models.matcher import DivergedError, match_segments

WEIGHTS = {"class_weight": 2.0, "mask_weight": 5.0, "dice_weight": 5.0}


@dataclass
class Truth:
    labels: Tensor
    masks: Tensor


def make(queries: int, segments: list[int], size: int = 4, classes: int = 3) -> tuple[Predictions, list[Truth]]:
    class_logits = torch.randn(len(segments), queries, classes + 1, dtype=torch.float64)
    mask_logits = 2 * torch.randn(len(segments), queries, size, size, dtype=torch.float64)
    truths = [Truth(torch.randint(classes, (count,)), torch.rand(count, size, size) < 0.5) for count in segments]
    return Predictions(class_logits, mask_logits, (size, size)), truths


def cost(predictions: Predictions, image: int, query: int, truth: Truth, segment: int) -> float:
    """Of one pair, over all pixels."""
    logits = predictions.class_logits[image, query].numpy()
    share = np.exp(logits[truth.labels[segment]]) / np.exp(logits).sum()
    probability = 1 / (1 + np.exp(-predictions.mask_logits[image, query].numpy().ravel()))
    true = truth.masks[segment].numpy().ravel()
    entropy = -np.log(np.where(true, probability, 1 - probability)).mean()
    dice = 1 - (2 * probability[true].sum() + 1) / (probability.sum() + true.sum() + 1)
    return float(-2 * share + 5 * entropy + 5 * dice)


@dataclass
class EveryPixel:
    masks: Tensor

    def at(self, points: Tensor) -> Tensor:
        return self.masks.flatten(1).to(points)


@pytest.fixture
def every_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are compared at every pixel instead of at random points."""
    monkeypatch.setattr(matcher, "values_at", lambda masks, image, at: masks[image].flatten(1))
    monkeypatch.setattr(matcher, "PackedMasks", EveryPixel)


@pytest.mark.usefixtures("every_pixel")
@pytest.mark.parametrize(("queries", "segments"), [(1, [1]), (5, [3, 2]), (4, [4, 0, 1]), (2, [3])])
def test_no_permutation_is_cheaper(queries: int, segments: list[int]) -> None:
    predictions, truths = make(queries, segments)
    matches = match_segments(predictions, truths, points=16, **WEIGHTS)
    for image, (match, truth) in enumerate(zip(matches, truths, strict=True)):
        pairs = list(zip(match.queries.tolist(), match.segments.tolist(), strict=True))
        assert len(pairs) == min(queries, len(truth.labels))
        assert len({query for query, _ in pairs}) == len({segment for _, segment in pairs}) == len(pairs)
        costs = np.array([[cost(predictions, image, q, truth, t) for t in range(len(truth.labels))] for q in range(queries)])
        total = sum(costs[pair] for pair in pairs)
        if queries >= len(truth.labels):
            best = min(sum(costs[q, t] for t, q in enumerate(order)) for order in permutations(range(queries), len(truth.labels)))
        else:
            best = min(sum(costs[q, t] for q, t in enumerate(order)) for order in permutations(range(len(truth.labels)), queries))
        assert total == pytest.approx(best, abs=1e-9)


@pytest.mark.usefixtures("every_pixel")
def test_the_costs_are_of_class_cross_entropy_and_dice(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[np.ndarray] = []

    def assign(costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        given.append(costs)
        return np.arange(3), np.arange(3)

    monkeypatch.setattr(matcher, "linear_sum_assignment", assign)
    predictions, truths = make(4, [3, 3])
    match_segments(predictions, truths, points=16, **WEIGHTS)
    for image, costs in enumerate(given):
        wanted = [[cost(predictions, image, query, truths[image], segment) for segment in range(3)] for query in range(4)]
        np.testing.assert_allclose(costs, wanted, rtol=1e-10)
    assert len(given) == 2


@pytest.mark.usefixtures("every_pixel")
@pytest.mark.parametrize("name", list(WEIGHTS))
def test_each_cost_alone_decides_where_the_others_weigh_nothing(name: str) -> None:
    """Query 1 is right in classes or in masks, query 0 in the other."""
    truth = Truth(torch.tensor([1]), torch.zeros(1, 4, 4, dtype=torch.bool))
    truth.masks[0, :2] = True
    class_logits, mask_logits = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4, 4)
    class_logits[0, int(name == "class_weight"), 1] = 9
    mask_logits[0, int(name != "class_weight")] = 9 * (2 * truth.masks[0].float() - 1)
    predictions = Predictions(class_logits, mask_logits, (4, 4))
    (match,) = match_segments(predictions, [truth], points=16, **{key: float(key == name) for key in WEIGHTS})
    assert match.queries.tolist() == [1]


@pytest.mark.parametrize("points", [200, 1000])
def test_permuted_truth_is_found_at_random_points(points: int) -> None:
    masks = torch.zeros(6, 32, 32, dtype=torch.bool)
    for index in range(6):
        masks[index, 5 * index : 5 * index + 5] = True
    order = torch.randperm(6)
    logits = 8.0 * (2 * masks[order].float() - 1)
    predictions = Predictions(torch.zeros(1, 6, 3), logits[None], (32, 32))
    (match,) = match_segments(predictions, [Truth(torch.zeros(6, dtype=torch.int64), masks)], points=points, **WEIGHTS)
    assert order[match.queries].tolist() == match.segments.tolist()


@pytest.mark.parametrize("field", ["class_logits", "mask_logits"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite_have_diverged(value: float, field: str) -> None:
    predictions, truths = make(3, [2])
    getattr(predictions, field)[:] = value
    with pytest.raises(DivergedError, match="not finite: training has diverged"):
        match_segments(predictions, truths, points=16, **WEIGHTS)


def test_matching_carries_no_gradient_and_leaves_the_predictions() -> None:
    predictions, truths = make(3, [2])
    predictions.mask_logits.requires_grad_()
    before = predictions.mask_logits.clone()
    (match,) = match_segments(predictions, truths, points=16, **WEIGHTS)
    assert match.queries.dtype == match.segments.dtype == torch.int64
    assert torch.equal(predictions.mask_logits, before)
