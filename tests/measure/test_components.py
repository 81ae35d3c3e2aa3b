from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from emca_bench.measure.components import component_ms
from emca_bench.measure.subjects import build_subject
from emca_bench.models.backbones import Backbone
from emca_bench.specs import Arm

MODEL = {"model": "mask2former_tiny", "image_size": "64x96", "classes": 3, "batch": 1}


@pytest.mark.parametrize("runtime", ["eager", "optimized"])
@pytest.mark.parametrize(("scope", "left_out"), [("end_to_end", set()), ("decoder", {"backbone", "pixel_decoder"})])
def test_every_part_has_its_time_and_the_parts_make_the_whole(runtime: str, scope: str, left_out: set[str]) -> None:
    subject = build_subject(Arm(name="emca", attention="emca"), {**MODEL, "scope": scope, "runtime": runtime}, seed=0)
    found = component_ms(subject.module, subject.call, device="cpu")
    assert set(found) == {"backbone", "pixel_decoder", "mask_decoder", "cross_attention", "other"} - left_out
    assert min(found.values()) >= 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in subject.module.modules())


def test_a_part_that_waits_is_the_one_that_takes_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = build_subject(Arm(name="none", attention="none"), {**MODEL, "scope": "model"}, seed=0)
    (backbone,) = (module for module in subject.module.modules() if isinstance(module, Backbone))
    plain = backbone.forward

    def slowly(*given: torch.Tensor) -> object:
        time.sleep(0.2)
        return plain(*given)

    monkeypatch.setattr(backbone, "forward", slowly)
    found = component_ms(subject.module, subject.call, device="cpu")
    assert found["backbone"] >= 200
    assert max(found, key=lambda name: found[name]) == "backbone"


def test_without_parts_there_is_nothing_to_tell() -> None:
    assert component_ms(nn.Linear(2, 2), lambda: None, device="cpu") == {}
    assert component_ms(object(), lambda: None, device="cpu") == {}
    idle = build_subject(Arm(name="none", attention="none"), {**MODEL, "scope": "model"}, seed=0)
    assert component_ms(idle.module, lambda: None, device="cpu") == {}
