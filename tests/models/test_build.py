"""Which decoder layers have the attention under study, and whether it sees its masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from emca_bench.errors import UsageError
from emca_bench.models import CrossAttention, build_model
from emca_bench.models.mask2former import Mask2Former
from emca_bench.models.mask_use import MASK_USES


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


def masks_seen(model: Mask2Former, images: torch.Tensor) -> list[bool]:
    """Of every cross-attention, whether it got a mask."""
    seen: list[bool] = []

    def note(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(positional[4] is not None)

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in model.modules() if isinstance(module, CrossAttention)]
    model(images)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("attention", ["emca", "masked_fused", "emca_soft", "none"])
def test_masks_are_seen_always_never_or_less_and_less(attention: str):
    images = 255 * torch.rand(1, 3, 64, 64)
    models = {use: build_model("mask2former_tiny", num_classes=3, attention=attention, mask_use=use) for use in MASK_USES}
    assert masks_seen(models["always"], images) == masks_seen(models["always"].eval(), images) == [True] * 3
    assert masks_seen(models["never"], images) == masks_seen(models["never"].eval(), images) == [False] * 3
    annealed = models["annealed"]
    assert annealed.mask_use is not None
    for share, expected in ((1.0, [True] * 3), (0.0, [False] * 3)):
        annealed.mask_use.share = share
        assert masks_seen(annealed, images) == expected
    annealed.mask_use.share = 0.5
    assert 0 < sum(sum(masks_seen(annealed, images)) for _ in range(20)) < 60
    annealed.mask_use.share = 1.0
    assert masks_seen(annealed.eval(), images) == [False] * 3


def test_taking_masks_away_leaves_weights_and_their_names_alone():
    states = []
    for use in MASK_USES:
        torch.manual_seed(5)
        states.append(build_model("mask2former_tiny", num_classes=3, mask_use=use).state_dict())
    assert all(state.keys() == states[0].keys() for state in states)
    assert all(torch.equal(state[name], states[0][name]) for state in states for name in state)


def test_a_rule_for_masks_that_nothing_reads_is_refused():
    with pytest.raises(UsageError, match="mask_rule='winner' with mask_use='never': expected threshold, nothing reads the masks"):
        build_model("mask2former_tiny", num_classes=3, mask_rule="winner", mask_use="never")


def test_an_unknown_use_of_masks_is_named():
    with pytest.raises(UsageError, match=r"mask_use='anealed' \(did you mean 'annealed'"):
        build_model("mask2former_tiny", num_classes=3, mask_use="anealed")
