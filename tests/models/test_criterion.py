"""The training loss against its formula at given points and matches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from emca_bench.models import Predictions, build_model, criterion
from emca_bench.models.criterion import Criterion
from emca_bench.models.matcher import DivergedError, Match

CLASSES, QUERIES, POINTS = 3, 5, 40


@dataclass
class Truth:
    labels: Tensor
    masks: Tensor


def make_predictions(batch: int, *, auxiliary: int = 0, size: int = 16) -> Predictions:
    def one() -> Predictions:
        return Predictions(
            torch.randn(batch, QUERIES, CLASSES + 1, dtype=torch.float64, requires_grad=True),
            torch.randn(batch, QUERIES, size, size, dtype=torch.float64, requires_grad=True),
            (4 * size, 4 * size),
        )

    return replace(one(), auxiliary=tuple(one() for _ in range(auxiliary)))


def make_truths(counts: list[int], size: int = 64) -> list[Truth]:
    return [Truth(torch.randint(CLASSES, (count,)), torch.rand(count, size, size) < 0.5) for count in counts]


def bilinear(image: np.ndarray, point: np.ndarray) -> float:
    """Value at (x, y) in 0..1, zero beyond the border."""
    height, width = image.shape
    x, y = point[0] * width - 0.5, point[1] * height - 0.5
    total = 0.0
    for row in (int(np.floor(y)), int(np.floor(y)) + 1):
        for column in (int(np.floor(x)), int(np.floor(x)) + 1):
            if 0 <= row < height and 0 <= column < width:
                total += (1 - abs(x - column)) * (1 - abs(y - row)) * image[row, column]
    return total


def formula(predictions: Predictions, truths: list[Truth], matches: list[Match], points: Tensor) -> dict[str, float]:
    weight_sum = class_loss = mask_loss = dice_loss = 0.0
    pairs = 0
    for image, (truth, match) in enumerate(zip(truths, matches, strict=True)):
        partner = dict(zip(match.queries.tolist(), match.segments.tolist(), strict=True))
        for query in range(QUERIES):
            wanted = int(truth.labels[partner[query]]) if query in partner else CLASSES
            weight = 1.0 if query in partner else 0.1
            logits = predictions.class_logits[image, query].detach().numpy()
            class_loss += weight * (np.log(np.exp(logits).sum()) - logits[wanted])
            weight_sum += weight
        for query, segment in zip(match.queries.tolist(), match.segments.tolist(), strict=True):
            mask = predictions.mask_logits[image, query].detach().numpy()
            at = points[pairs].numpy()
            logit = np.array([bilinear(mask, point) for point in at])
            true = np.array([bilinear(truth.masks[segment].numpy().astype(float), point) for point in at])
            probability = 1 / (1 + np.exp(-logit))
            mask_loss += float(-(true * np.log(probability) + (1 - true) * np.log(1 - probability)).mean())
            dice_loss += float(1 - (2 * (probability * true).sum() + 1) / (probability.sum() + true.sum() + 1))
            pairs += 1
    return {"loss_ce": class_loss / weight_sum, "loss_mask": mask_loss / max(pairs, 1), "loss_dice": dice_loss / max(pairs, 1)}


@pytest.fixture
def fix(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Match], Tensor], None]:
    """Fixes the matches and the sampled points."""

    def fix(matches: list[Match], points: Tensor) -> None:
        monkeypatch.setattr(criterion, "match_segments", lambda *_, **__: matches)
        monkeypatch.setattr(criterion, "uncertain_points", lambda *_, **__: points)

    return fix


def random_matches(counts: list[int]) -> list[Match]:
    return [Match(torch.randperm(QUERIES)[:count].sort().values, torch.randperm(count)) for count in counts]


@pytest.mark.parametrize("counts", [[2], [3, 1], [0, 4, 2], [0]])
def test_losses_follow_the_formula(fix: Callable[[list[Match], Tensor], None], counts: list[int]) -> None:
    predictions, truths, matches = make_predictions(len(counts)), make_truths(counts), random_matches(counts)
    points = torch.rand(sum(counts), POINTS, 2, dtype=torch.float64)
    fix(matches, points)
    losses = Criterion(classes=CLASSES)(predictions, truths)
    wanted = formula(predictions, truths, matches, points)
    assert losses.keys() == wanted.keys()
    for name, value in wanted.items():
        # the weight 0.1 of "no object" is a float32
        assert losses[name].item() == pytest.approx(value, rel=1e-7, abs=1e-12), name


def test_a_constant_map_has_closed_losses(fix: Callable[[list[Match], Tensor], None]) -> None:
    logit = torch.randn(()).double()
    predictions = make_predictions(1)
    predictions.mask_logits.data.fill_(logit)
    truth = Truth(torch.tensor([1]), torch.ones(1, 64, 64, dtype=torch.bool))
    # no nearer to the border than the centres of the outermost pixels
    points = 0.1 + 0.8 * torch.rand(1, POINTS, 2, dtype=torch.float64)
    fix([Match(torch.tensor([2]), torch.tensor([0]))], points)
    losses = Criterion(classes=CLASSES)(predictions, [truth])
    probability = 1 / (1 + (-logit).exp())
    torch.testing.assert_close(losses["loss_mask"], -probability.log())
    torch.testing.assert_close(losses["loss_dice"], 1 - (2 * POINTS * probability + 1) / (POINTS * (probability + 1) + 1))


def test_perfect_masks_cost_next_to_nothing_and_inverted_ones_much(fix: Callable[[list[Match], Tensor], None]) -> None:
    coarse = torch.rand(2, 16, 16) < 0.5
    truth = Truth(torch.tensor([0, 2]), coarse.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2))
    centres = (torch.randint(16, (2, POINTS, 2)) + 0.5).double() / 16
    fix([Match(torch.tensor([0, 3]), torch.tensor([1, 0]))], centres)
    costs = {}
    for sign in (1, -1):
        predictions = make_predictions(1)
        predictions.mask_logits.data[0, [3, 0]] = sign * 25 * (2 * coarse.double() - 1)
        predictions.class_logits.data.fill_(-25)
        wanted = [2, CLASSES, CLASSES, 0, CLASSES]
        predictions.class_logits.data[0, range(QUERIES), wanted] = 25
        costs[sign] = {name: loss.item() for name, loss in Criterion(classes=CLASSES)(predictions, [truth]).items()}
    assert all(0 <= loss < 1e-6 for loss in costs[1].values())
    assert costs[-1]["loss_mask"] == pytest.approx(25)
    assert costs[-1]["loss_dice"] > 0.9


def test_every_prediction_has_its_losses_and_its_own_matching() -> None:
    predictions, truths = make_predictions(2, auxiliary=3), make_truths([2, 1])
    losses = Criterion(classes=CLASSES, points=POINTS)(predictions, truths)
    parts = ("loss_ce", "loss_mask", "loss_dice")
    assert {*losses} == {name + suffix for name in parts for suffix in ("", "_0", "_1", "_2")}
    Criterion(classes=CLASSES, points=POINTS).total(losses).backward()
    for prediction in (predictions, *predictions.auxiliary):
        for tensor in (prediction.class_logits, prediction.mask_logits):
            assert tensor.grad is not None
            assert tensor.grad.isfinite().all()
            assert tensor.grad.any()


def test_the_total_weighs_by_kind() -> None:
    weighing = Criterion(classes=CLASSES, class_weight=2, mask_weight=3, dice_weight=7)
    losses = {"loss_ce": 1.0, "loss_mask": 10.0, "loss_dice": 100.0, "loss_ce_0": 0.1, "loss_mask_0": 0.01, "loss_dice_12": 0.001}
    total = weighing.total({name: torch.tensor(loss, dtype=torch.float64) for name, loss in losses.items()})
    assert total.item() == pytest.approx(2 * 1.1 + 3 * 10.01 + 7 * 100.001)


@pytest.mark.parametrize("counts", [[0], [0, 0], [0, 3], [QUERIES + 2]])
def test_images_without_segments_and_with_more_than_queries(counts: list[int]) -> None:
    predictions, truths = make_predictions(len(counts)), make_truths(counts)
    weighing = Criterion(classes=CLASSES, points=POINTS)
    losses = weighing(predictions, truths)
    assert all(loss.isfinite() for loss in losses.values())
    if not any(counts):
        assert losses["loss_mask"].item() == losses["loss_dice"].item() == 0
    weighing.total(losses).backward()
    for tensor in (predictions.class_logits, predictions.mask_logits):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


def test_predictions_that_are_not_finite_have_diverged() -> None:
    predictions = make_predictions(1)
    predictions.mask_logits.data[0, 0, 0] = float("nan")
    with pytest.raises(DivergedError):
        Criterion(classes=CLASSES, points=500)(predictions, make_truths([2]))


@pytest.mark.parametrize("attention", ["masked", "emca", "emca_soft"])
def test_a_model_gets_finite_gradients_in_every_parameter(attention: str) -> None:
    model = build_model("mask2former_tiny", num_classes=CLASSES, attention=attention).train()
    predictions = model(255 * torch.rand(2, 3, 64, 64))
    weighing = Criterion(classes=CLASSES, points=100)
    weighing.total(weighing(predictions, make_truths([2, 0]))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("size", [(60, 64), (64, 16), (16, 16)])
def test_masks_of_another_size_than_the_padded_input_are_refused(size: tuple[int, int]) -> None:
    predictions = make_predictions(1)
    truth = Truth(torch.tensor([0]), torch.zeros(1, *size, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"target 0 have shape .*, expected \[T, 64, 64\]"):
        Criterion(classes=CLASSES, points=POINTS)(predictions, [truth])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_predictions_are_compared_in_float32(dtype: torch.dtype) -> None:
    model = build_model("mask2former_tiny", num_classes=CLASSES).train()
    predictions = model(255 * torch.rand(1, 3, 64, 64))
    half = Predictions(
        predictions.class_logits.to(dtype), predictions.mask_logits.to(dtype), predictions.image_size, auxiliary=predictions.auxiliary[:1]
    )
    truth = Truth(torch.tensor([0]), torch.rand(1, 64, 64) < 0.5)
    losses = Criterion(classes=CLASSES, points=POINTS)(half, [truth])
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    Criterion(classes=CLASSES, points=POINTS).total(losses).backward()


def test_sums_over_masks_are_divided_by_true_segments_matched_or_not(fix: Callable[[list[Match], Tensor], None]):
    """The published rule; it matters where an image has more segments than there are queries."""
    predictions, (truth,) = make_predictions(1), make_truths([2 * QUERIES])
    fix([Match(torch.arange(QUERIES), torch.arange(QUERIES))], torch.rand(QUERIES, POINTS, 2, dtype=torch.float64))
    found = Criterion(classes=CLASSES)(predictions, [truth])
    matched = Criterion(classes=CLASSES)(predictions, [Truth(truth.labels[:QUERIES], truth.masks[:QUERIES])])
    for name in ("loss_mask", "loss_dice"):
        assert 2 * found[name].item() == pytest.approx(matched[name].item())


@pytest.mark.parametrize(("own", "others", "expected"), [(5, 3, 4.0), (0, 1, 1.0), (0, 0, 1.0)])
def test_segments_are_averaged_over_processes(own: int, others: int, expected: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(criterion.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(criterion.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(criterion.dist, "all_reduce", lambda total: total.add_(others))
    assert criterion._segments_per_process(make_truths([own]), torch.device("cpu")) == expected
