"""The loss on the choice of pixels against its definition, and what a training makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from emca_bench.data.targets import Targets
from emca_bench.errors import UsageError
from emca_bench.models import build_model
from emca_bench.models.attention.emca import EMCA, Kept
from emca_bench.models.criterion import Criterion
from emca_bench.models.mask2former import Mask2Former
from emca_bench.models.matcher import Match
from emca_bench.models.predictions import Predictions
from emca_bench.models.selection_loss import _missed, keep_scores, selection_loss

SHAPE = (3, 4)


def make_target() -> Targets:
    """Two segments on a map of 12x16 pixels: cells of 4x4, of which the first segment has one in part."""
    masks = torch.zeros(2, 12, 16, dtype=torch.bool)
    masks[0, :6, :8], masks[1, 8:, 4:] = True, True
    return Targets(torch.tensor([3, 1]), masks, masks.any(0))


def make_model(attention: str = "emca", **switches: Any) -> Mask2Former:
    model = build_model("mask2former_tiny", num_classes=5, attention=attention, attention_switches=switches, queries=6, width=32)
    return model.train()


def matches_of(predictions: Predictions, targets: list[Targets]) -> list[Sequence[Match]]:
    return [chosen.matches for chosen in Criterion(classes=5, points=64).choose(predictions, targets)[1:]]


def attentions(model: Mask2Former) -> list[EMCA]:
    return [module for module in model.modules() if isinstance(module, EMCA)]


@pytest.mark.parametrize("masked", [True, False])
def test_the_weight_inside_is_that_of_a_softmax_over_the_allowed_pixels(masked: bool) -> None:
    scores = torch.randn(2, 5, 3, 12)
    allowed = torch.rand(2, 5, 12) < 0.5
    allowed[1, 4] = False
    allowed[1, 0, 0] = True
    target, match = make_target(), Match(torch.tensor([4, 0]), torch.tensor([1, 0]))
    found = _missed(Kept(scores, allowed if masked else None, SHAPE), 1, target, match)
    wanted = []
    for query, segment in ((4, 1), (0, 0)):
        cells = [
            target.masks[segment, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].float().mean() for y in range(SHAPE[0]) for x in range(SHAPE[1])
        ]
        seen = allowed[1, query] if masked and query != 4 else torch.ones(12, dtype=torch.bool)
        for m in range(3):
            weights = scores[1, query, m].exp() * seen
            wanted.append(-(weights / weights.sum() * torch.stack(cells)).sum().log())
    torch.testing.assert_close(found, torch.stack(wanted))


def test_a_query_that_may_not_look_inside_does_not_count() -> None:
    scores = torch.randn(1, 2, 1, 12, requires_grad=True)
    allowed = torch.zeros(1, 2, 12, dtype=torch.bool)
    # the last cell is of segment 1 alone, so that query 0 sees nothing of its segment 0
    allowed[..., -1] = True
    found = _missed(Kept(scores, allowed, SHAPE), 0, make_target(), Match(torch.tensor([0, 1]), torch.tensor([0, 1])))
    torch.testing.assert_close(found, torch.zeros(1))
    nothing = _missed(Kept(scores, allowed, SHAPE), 0, make_target(), Match(torch.tensor([0]), torch.tensor([0])))
    assert nothing.shape == (0,)
    (gradient,) = torch.autograd.grad(found.sum() + nothing.sum(), scores)
    assert gradient.isfinite().all()


def test_gradients_agree_with_differences() -> None:
    allowed = torch.rand(1, 2, 12) < 0.7
    allowed[..., 0] = allowed[..., -1] = True
    match = Match(torch.tensor([0, 1]), torch.tensor([0, 1]))
    scores = torch.randn(1, 2, 2, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda given: _missed(Kept(given, allowed, SHAPE), 0, make_target(), match), scores)


@pytest.mark.parametrize(
    ("attention", "switches"),
    [
        ("emca", {}),
        ("emca", {"heads": 4, "folded": True}),
        ("emca", {"selection": "topk_mean", "prototypes": 4}),
        ("emca", {"heads": 2, "head_split": "features"}),
        ("emca_soft", {}),
        ("pem_ca", {"heads": 4}),
    ],
)
def test_it_trains_what_chooses_and_falls(attention: str, switches: dict[str, Any]) -> None:
    """On two images, one of them without a segment: W_Q and W_K get a gradient, and a small step against it lessens the loss as it says."""
    model = make_model(attention, **switches).double()
    # mask logits are 0, so that every layer has pixels in and out of a segment to choose from
    for parameter in model.sem_seg_head.predictor.mask_embed.layers[-1].parameters():
        nn.init.zeros_(parameter)
    images = 255 * torch.rand(2, 3, 64, 96, dtype=torch.float64)
    masks = torch.zeros(2, 64, 96, dtype=torch.bool)
    masks[0, :40, :60], masks[1, 40:, 30:] = True, True
    full = Targets(torch.tensor([0, 4]), masks, masks.any(0))
    targets = [full, Targets(full.labels[:0], full.masks[:0], full.valid)]
    keep_scores(model)
    parameters = [parameter for module in attentions(model) for parameter in module.parameters()]
    matches = matches_of(model(images), targets)

    def loss() -> torch.Tensor:
        model(images)
        return selection_loss(model, matches, targets)

    before = loss()
    assert all(module.kept is None for module in attentions(model))
    before.backward()
    for module in attentions(model):
        for weight in (module.query_projection.weight, module.key_projection.weight):
            assert weight.grad is not None
            assert weight.grad.isfinite().all()
            assert weight.grad.any()
    squares = sum(float(parameter.grad.square().sum()) for parameter in parameters if parameter.grad is not None)
    # so small that no choice of a pixel changes on the way
    step = 1e-9 / squares
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                parameter -= step * parameter.grad
    assert float(before.detach() - loss().detach()) == pytest.approx(1e-9, rel=0.01)


def test_images_without_segments_have_no_loss() -> None:
    model = make_model()
    keep_scores(model)
    none = torch.zeros(0, 64, 64, dtype=torch.bool)
    targets = [Targets(torch.zeros(0, dtype=torch.int64), none, torch.ones(64, 64, dtype=torch.bool))]
    loss = selection_loss(model, matches_of(model(255 * torch.rand(1, 3, 64, 64)), targets), targets)
    assert loss.item() == 0
    loss.backward()


def test_kept_scores_are_those_of_the_call_and_are_kept_no_longer_than_asked_for() -> None:
    model = make_model("emca", heads=2)
    images = 255 * torch.rand(1, 3, 64, 64)
    model(images)
    assert all(module.kept is None for module in attentions(model))
    keep_scores(model)
    model(images)
    for module in attentions(model):
        assert module.kept is not None
        assert module.kept.scores_BQMP.shape == (1, 6, 2, module.kept.shape[0] * module.kept.shape[1])
    keep_scores(model, False)
    model(images)
    assert all(module.kept is None for module in attentions(model))


@pytest.mark.parametrize(("attention", "switches"), [("masked", {}), ("none", {}), ("mask_pooling", {}), ("emca", {"selection": "random"})])
def test_without_a_score_there_is_nothing_to_train(attention: str, switches: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="no cross-attention of the model chooses pixels by a score"):
        keep_scores(make_model(attention, **switches))
