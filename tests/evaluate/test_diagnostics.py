"""Weights on pixels are those that the attentions use, and shares are those of a truth made for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from emca_kernels import attend_prototypes

from emca_bench.data import Scenes
from emca_bench.data.targets import Targets
from emca_bench.evaluate.diagnostics import NAMES, Call, Diagnostics, Places, Watched, diagnose, own_segments, pixel_weights
from emca_bench.models import build_attention, build_model
from emca_bench.models.predictions import Predictions

SHAPE = (5, 7)


def call_of(module: Any, *, width: int = 16, queries: int = 6, empty: int = 2) -> Call:
    allowed = torch.rand(1, queries, SHAPE[0] * SHAPE[1]) < 0.4
    allowed[0, empty] = False
    pixels = SHAPE[0] * SHAPE[1]
    tensors = [torch.randn(1, queries, width), torch.randn(1, queries, width), torch.randn(1, pixels, width), torch.randn(1, pixels, width)]
    return Call(module.double().eval(), *(tensor.double() for tensor in tensors), allowed, SHAPE)


@pytest.mark.parametrize("residual", ["raw", "projected"])
@pytest.mark.parametrize(
    "switches",
    [
        {"heads": 1},
        {"heads": 4},
        {"selection": "topk_mean", "prototypes": 3},
        {"selection": "topk_mean", "prototypes": 30},
        {"selection": "topk_softmax", "prototypes": 3, "heads": 2},
        {"selection": "mean"},
        {"selection": "softmax", "heads": 2},
        {"normalize_keys": True, "local_conv": True, "query_norm": True},
        {"positions": False},
        {"empty_mask": "first_pixel"},
        {"selection": "pool_and_prototype", "heads": 2},
        {"selection": "softmax", "heads": 4, "temperature": "per_head", "temperature_start": 0.5},
        {"selection": "softmax", "heads": 4, "head_split": "features"},
        {"heads": 2, "head_split": "features"},
    ],
    ids=str,
)
def test_weights_give_the_prototypes_of_emca(switches: dict[str, Any], residual: str):
    module = build_attention("emca", width=16, residual=residual, **switches)
    call = call_of(module)
    weights_QMP = pixel_weights(call)
    assert weights_QMP is not None
    torch.testing.assert_close(weights_QMP.sum(-1), torch.ones_like(weights_QMP[..., 0]))
    features, pos = call.features, call.feature_pos if module.positions else torch.zeros_like(call.features)
    source = features + pos if module.local_conv is None else module.local_conv(features + pos, SHAPE)
    over_features = module.head_split == "features"
    rows_PMd = (source if over_features else module.keys(source))[0].unflatten(-1, (module.heads, -1))
    prototypes = torch.einsum("qmp,pmd->qmd", weights_QMP, rows_PMd).flatten(1)[None]
    if over_features:
        prototypes = module.key_projection(prototypes)
    located = call.queries + call.query_pos if module.positions else call.queries
    projected = module.query_projection(located if module.query_norm is None else module.query_norm(located))
    compared = torch.nn.functional.normalize(projected, dim=-1) if module.normalize_keys else projected
    parts = (module.product_projection, module.out_projection)
    update = attend_prototypes(prototypes, compared, parts[0].weight, parts[0].bias, module.alpha, parts[1].weight, parts[1].bias)
    expected = update + (projected if residual == "projected" else call.queries)
    found = module(call.queries, call.query_pos, features, call.feature_pos, call.allowed, shape=SHAPE)
    torch.testing.assert_close(found, expected)


def test_weights_give_the_result_of_masked_attention():
    module = build_attention("masked_fused", width=16, heads=4)
    call = call_of(module)
    weights_QMP = pixel_weights(call)
    assert weights_QMP is not None
    weight, bias = module.in_proj_weight.chunk(3)[2], module.in_proj_bias.chunk(3)[2]
    values_PMd = (call.features[0] @ weight.mT + bias).unflatten(-1, (4, -1))
    attended = torch.einsum("qmp,pmd->qmd", weights_QMP, values_PMd).flatten(1)
    found = module(call.queries, call.query_pos, call.features, call.feature_pos, call.allowed, shape=SHAPE)
    torch.testing.assert_close(found, call.queries + module.out_proj(attended)[None])


def test_random_choice_counts_as_its_expectation_and_nothing_as_nothing():
    call = call_of(build_attention("emca", width=16, selection="random"))
    weights_QMP = pixel_weights(call)
    assert weights_QMP is not None
    torch.testing.assert_close(weights_QMP[0, 0], call.allowed[0, 0].double() / call.allowed[0, 0].sum())
    torch.testing.assert_close(weights_QMP[2, 0], torch.full_like(weights_QMP[2, 0], 1 / 35))
    assert pixel_weights(call_of(build_attention("none", width=16))) is None


@pytest.mark.parametrize("positions", [True, False])
def test_weights_give_the_result_of_the_mask_mean(positions: bool):
    module = build_attention("mask_mean", width=16, positions=positions)
    call = call_of(module)
    weights_QMP = pixel_weights(call)
    assert weights_QMP is not None
    assert call.feature_pos is not None
    seen_BPC = call.features + call.feature_pos if positions else call.features
    found = module(call.queries, call.query_pos, call.features, call.feature_pos, call.allowed, shape=SHAPE)
    torch.testing.assert_close(found, call.queries + module.projection(weights_QMP[:, 0] @ seen_BPC[0]))


@pytest.mark.parametrize(("attention", "switches"), [("emca", {"selection": "mean"}), ("mask_mean", {})])
def test_shares_of_a_made_truth(attention: str, switches: dict[str, Any]):
    """Query 0 may look at its object and as many pixels beside it, query 1 nowhere, query 2 has no object."""
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, :4, :4], masks[1, 4:, 4:] = True, True
    target = Targets(torch.tensor([0, 1]), masks, masks.any(0))
    allowed = torch.zeros(1, 3, 16, dtype=torch.bool)
    allowed[0, 0, :8] = True
    allowed[0, 2] = True
    module = build_attention(attention, width=8, **switches)
    call = Call(module, torch.randn(1, 3, 8), None, torch.randn(1, 16, 8), None, allowed, (4, 4))
    found = Diagnostics()
    found._layers = 1
    found._layer(0, call, target, np.array([0, 1, -1]), np.array([0, -1, 1]), None)
    [values] = found.values()
    assert values["empty_masks"] == pytest.approx(1 / 3)
    assert values["empty_masks_matched"] == pytest.approx(1 / 2)
    assert values["lost_segments"] == pytest.approx(1 / 2)
    assert values["inside_allowed"] == values["inside_prototypes"] == pytest.approx(1 / 2)
    # a mean chooses no pixel
    assert values["distinct_pixels"] is None
    assert values["moved_prototypes"] is None


def test_places_meet_on_the_coarser_grid():
    fine = Places(torch.tensor([[[0, 0]], [[1, 1]], [[3, 7]]]), (4, 8))
    assert fine.on((2, 4)).tolist() == [[[0, 0]], [[0, 0]], [[1, 3]]]
    odd = Places(torch.tensor([[[2, 4]]]), (5, 9))
    assert odd.on((3, 5)).tolist() == [[[1, 2]]]


def test_queries_own_what_they_predict():
    masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    masks[0, :8], masks[1, 8:] = True, True
    logits = torch.full((1, 4, 4, 4), -9.0)
    logits[0, 3, :2], logits[0, 1, 2:] = 9.0, 9.0
    own = own_segments(Predictions(torch.zeros(1, 4, 3), logits, (16, 16)), Targets(torch.tensor([0, 1]), masks, masks.any(0)))
    assert own.tolist() == [-1, 1, -1, 0]


@pytest.mark.parametrize("attention", ["emca", "masked_fused", "none"])
@pytest.mark.parametrize("task", ["semantic", "panoptic"])
def test_a_whole_model(attention: str, task: str):
    model = build_model("mask2former_tiny", num_classes=10, attention=attention)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.get_rng_state()
    layers = diagnose(model, Scenes("val", size=(64, 64), count=3), task)
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert len(layers) == 3
    for values in layers:
        assert set(values) == set(NAMES)
        assert all(value is None or 0 <= value <= 1 + 1e-6 for value in values.values())
        assert (values["inside_prototypes"] is None) == (attention == "none" or values["inside_allowed"] is None)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_calls_are_in_the_order_of_layers():
    model = build_model("mask2former_tiny", num_classes=10, attention_layers="1", other_attention="masked").eval()
    with Watched(model) as watched, torch.inference_mode():
        model(torch.rand(1, 3, 64, 96) * 255)
    assert [call.shape for call in watched.calls] == [(2, 3), (4, 6), (8, 12)]
    assert [type(call.module).__name__ for call in watched.calls] == ["MaskedCrossAttention", "EMCA", "MaskedCrossAttention"]
