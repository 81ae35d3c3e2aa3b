from __future__ import annotations

import itertools

import pytest
from torch import nn

from emca_bench.errors import UsageError
from emca_bench.models import build_model
from emca_bench.train.recipe import Recipe, make_optimizer


def test_rate_rises_then_falls_to_zero():
    recipe = Recipe(steps=100, batch=1, crop=(32, 32), warmup=0.1)
    rates = [recipe.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert max(rates) == pytest.approx(1.0)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert rates[100] == pytest.approx(0.0)


def test_every_parameter_is_trained_once_with_its_rate_and_decay():
    model = build_model("mask2former_tiny", num_classes=3)
    recipe = Recipe(steps=10, batch=1, crop=(32, 32), learning_rate=1.0)
    optimizer = make_optimizer(model, recipe, pretrained_backbone=True)
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    assert set(groups) == {id(parameter) for parameter in model.parameters()}
    backbone = {id(parameter) for parameter in model.backbone.parameters()}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            group = groups[id(parameter)]
            assert group["lr"] == (0.1 if id(parameter) in backbone else 1.0)
            assert (group["weight_decay"] == 0) == isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.Embedding))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch": 0}, {"points": 0}, {"learning_rate": 0.0}])
def test_senseless_numbers_are_refused(wrong: dict[str, float]):
    with pytest.raises(UsageError, match="training needs"):
        Recipe(**{"steps": 1, "batch": 1, "crop": (32, 32), **wrong})  # type: ignore[arg-type]
