"""Which decoder layers have the attention under study."""

from __future__ import annotations

import pytest
import torch

from emca_bench.errors import UsageError
from emca_bench.models import build_model


@pytest.mark.parametrize(
    ("text", "expected"), [("all", {0, 1, 2, 3}), ("0", {0}), ("1-2", {1, 2}), ("0,2-3", {0, 2, 3}), (" 3 , 1", {1, 3})]
)
def test_layers_of_an_attention_are_those_named(text: str, expected: set[int]):
    model = build_model("mask2former_tiny", num_classes=3, attention="emca", layers=4, attention_layers=text, other_attention="none")
    layers = model.sem_seg_head.predictor.transformer_cross_attention_layers
    assert {index for index, layer in enumerate(layers) if type(layer.multihead_attn).__name__ == "EMCA"} == expected


@pytest.mark.parametrize("text", ["", "4", "2-1", "a", "0-", "-1", "0,,1", "1.5"])
def test_layers_that_are_not_there_are_refused(text: str):
    with pytest.raises(UsageError, match="attention_layers="):
        build_model("mask2former_tiny", num_classes=3, layers=4, attention_layers=text)


def test_layers_without_the_attention_start_as_they_would_alone():
    """All but the cross-attentions are the same whatever the layers have, so that arms differ in them alone."""
    states = []
    for chosen in ("all", "1"):
        torch.manual_seed(5)
        states.append(build_model("mask2former_tiny", num_classes=3, attention="emca", attention_layers=chosen).state_dict())
    shared = [name for name in states[0] if "cross_attention" not in name]
    assert all(torch.equal(states[0][name], states[1][name]) for name in shared)
