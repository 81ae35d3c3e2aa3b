"""The mean of the mask: what it is equal to, and what it does not look at."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from emca_bench.models import build_attention

WIDTH, QUERIES, SHAPE = 24, 7, (5, 9)
PIXELS = SHAPE[0] * SHAPE[1]


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    drawn = {name: torch.randn(2, count, WIDTH, dtype=torch.float64) for name, count in (("queries", QUERIES), ("features", PIXELS))}
    places = {"query_pos": torch.randn(1, QUERIES, WIDTH).double(), "feature_pos": torch.randn(PIXELS, WIDTH).double()}
    allowed = torch.rand(2, QUERIES, PIXELS) < 0.3
    allowed[0, 2] = False
    allowed[1, 3] = True
    return {**drawn, **places, "allowed": allowed}


def test_it_is_masked_cross_attention_with_equal_weights(inputs: dict[str, torch.Tensor]) -> None:
    masked = build_attention("masked", width=WIDTH, heads=4).double()
    mean = build_attention("mask_mean", width=WIDTH, positions=False).double()
    state = masked.state_dict()
    for bias in ("in_proj_bias", "out_proj.bias"):
        nn.init.normal_(state[bias])
    # without queries all scores are equal
    state["in_proj_weight"][:WIDTH], state["in_proj_bias"][:WIDTH] = 0, 0
    value, value_bias = state["in_proj_weight"][2 * WIDTH :], state["in_proj_bias"][2 * WIDTH :]
    out = state["out_proj.weight"]
    mean.load_state_dict({"projection.weight": out @ value, "projection.bias": out @ value_bias + state["out_proj.bias"]})
    torch.testing.assert_close(mean(**inputs, shape=SHAPE), masked(**inputs, shape=SHAPE))


def test_positions_are_those_of_the_pixels_alone(inputs: dict[str, torch.Tensor]) -> None:
    mean = build_attention("mask_mean", width=WIDTH).double()
    located = {**inputs, "features": inputs["features"] + inputs["feature_pos"], "feature_pos": None, "query_pos": None}
    torch.testing.assert_close(mean(**inputs, shape=SHAPE), mean(**located, shape=SHAPE))


def test_what_is_added_does_not_depend_on_the_query(inputs: dict[str, torch.Tensor]) -> None:
    mean = build_attention("mask_mean", width=WIDTH).double()
    others = {**inputs, "queries": torch.randn_like(inputs["queries"])}
    added, again = (mean(**given, shape=SHAPE) - given["queries"] for given in (inputs, others))
    torch.testing.assert_close(added, again)


def test_gradients(inputs: dict[str, torch.Tensor]) -> None:
    mean = build_attention("mask_mean", width=WIDTH).double()
    places, allowed = (inputs["query_pos"], inputs["feature_pos"]), inputs["allowed"]
    queries, features = (inputs[name].requires_grad_() for name in ("queries", "features"))

    def call(queries: torch.Tensor, features: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        state = dict(zip(("projection.weight", "projection.bias"), parameters, strict=True))
        return torch.func.functional_call(mean, state, (queries, places[0], features, places[1], allowed), {"shape": SHAPE})

    assert torch.autograd.gradcheck(call, (queries, features, *mean.parameters()), fast_mode=True)
