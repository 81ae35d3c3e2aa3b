from __future__ import annotations

import itertools

import pytest
from torch import nn

from emca_bench.errors import UsageError
from emca_bench.models import build_model
from emca_bench.train.recipe import Recipe, make_optimizer, make_recipe


def test_rate_rises_then_falls_to_zero():
    recipe = Recipe(steps=100, batch=1, crop=(32, 32), warmup=0.1)
    rates = [recipe.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert max(rates) == pytest.approx(1.0)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert rates[100] == pytest.approx(0.0)


@pytest.mark.parametrize("name", ["mask2former_tiny", "mask2former_swin_tiny"])
def test_every_parameter_is_trained_once_with_its_rate_and_decay(name: str):
    model = build_model(name, num_classes=3, layers=1)
    recipe = Recipe(steps=10, batch=1, crop=(32, 32), learning_rate=1.0)
    optimizer = make_optimizer(model, recipe, pretrained_backbone=True)
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    assert set(groups) == {id(parameter) for parameter in model.parameters()}
    backbone = {id(parameter) for parameter in model.backbone.parameters()}
    for module in model.modules():
        for own, parameter in module.named_parameters(recurse=False):
            group = groups[id(parameter)]
            assert group["lr"] == (0.1 if id(parameter) in backbone else 1.0)
            free = isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, nn.Embedding)) or own == "relative_position_bias_table"
            assert (group["weight_decay"] == 0) == free


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch": 0}, {"points": 0}, {"learning_rate": 0.0}])
def test_senseless_numbers_are_refused(wrong: dict[str, float]):
    with pytest.raises(UsageError, match="training needs"):
        Recipe(**{"steps": 1, "batch": 1, "crop": (32, 32), **wrong})  # type: ignore[arg-type]


def test_the_published_schedule_falls_as_a_power():
    recipe = make_recipe("mask2former", steps=100, batch=1, crop=(32, 32))
    assert [recipe.rate(step) for step in (0, 50, 100)] == pytest.approx([1.0, 0.5**0.9, 0.0])
    assert (recipe.clip_norm, recipe.points, recipe.precision, recipe.learning_rate) == (0.01, 12544, "bfloat16", 1e-4)
    assert make_recipe("mask2former", steps=1, batch=1, crop=(32, 32), learning_rate=4e-4).learning_rate == 4e-4


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"schedule": "polly"}, "did you mean 'poly'"),
        ({"precision": "float16"}, "expected one of float32, bfloat16"),
        ({"ema": 1.0}, "0 <= ema < 1"),
        ({"clip_norm": 0.0}, "positive learning_rate and clip_norm"),
        ({"warmup": 1.5}, "0 <= warmup <= 1"),
        ({"selection_weight": -1.0}, "selection_weight=-1.0; expected a number of at least 0"),
        ({"selection_weight": float("nan")}, "selection_weight=nan"),
        ({"seed": -1}, "seed of at least 0"),
    ],
)
def test_numbers_out_of_range_are_named(wrong: dict[str, object], words: str):
    with pytest.raises(UsageError) as caught:
        make_recipe("short", **{"steps": 1, "batch": 1, "crop": (32, 32), **wrong})
    assert words in str(caught.value)


def test_an_unknown_recipe_is_named():
    with pytest.raises(UsageError, match="unknown recipe 'mask2fomer'"):
        make_recipe("mask2fomer", steps=1, batch=1, crop=(32, 32))
