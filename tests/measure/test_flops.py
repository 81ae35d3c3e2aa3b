from __future__ import annotations

import pytest

from emca_bench.measure.flops import count_macs
from emca_bench.specs import Arm

ATTENTION = {"scope": "attention", "pixels": "64x64", "queries": 100, "width": 256, "batch": 1}


def arm(attention: str, **switches: object) -> Arm:
    return Arm(name=attention, attention=attention, switches=switches)  # type: ignore[arg-type]


@pytest.mark.parametrize("attention", ["masked", "masked_fused"])
def test_masked_cross_attention_is_counted_in_full_in_both_forms(attention: str):
    counted = count_macs(arm(attention), ATTENTION)
    assert counted["macs"] == pytest.approx(759.7e6, rel=0.005)


@pytest.mark.parametrize(
    ("switches", "per_pixel", "projections"),
    [({"folded": False}, 256 * 256 + 100 * 256, 3), ({"folded": True}, 100 * 256, 5)],
    ids=["as written", "folded"],
)
def test_emca_counts_what_the_closed_form_says(switches: dict[str, object], per_pixel: int, projections: int):
    counted = count_macs(arm("emca", **switches), ATTENTION)
    assert counted["macs"] == pytest.approx(4096 * per_pixel + projections * 100 * 256 * 256, rel=0.005)
    assert counted["closed_form_macs"] == pytest.approx(counted["macs"], rel=0.005)


def test_macs_grow_with_the_batch():
    single, triple = (count_macs(arm("emca_soft"), {**ATTENTION, "batch": batch}) for batch in (1, 3))
    assert triple["macs"] == 3 * single["macs"]
    assert triple["closed_form_macs"] == 3 * single["closed_form_macs"]


@pytest.mark.parametrize("scope", ["decoder", "model", "end_to_end"])
@pytest.mark.parametrize("mask_source", ["logits", "features"])
def test_components_add_up_and_cross_attention_equals_its_closed_form(scope: str, mask_source: str):
    params = {"scope": scope, "model": "mask2former_r50", "image_size": "256x320", "classes": 19, "batch": 2, "mask_source": mask_source}
    counted = count_macs(arm("masked"), params)
    assert sum(counted["components"].values()) == counted["macs"]
    assert all(macs > 0 for macs in counted["components"].values())
    assert counted["components"]["cross_attention"] == pytest.approx(counted["closed_form_macs"], rel=0.01)
    assert ("backbone" in counted["components"]) == (scope != "decoder")


def test_features_rewrite_saves_mask_heads_and_nothing_else():
    params = {"scope": "model", "model": "mask2former_r50", "image_size": "512x512", "classes": 150, "batch": 1}
    logits, features = (count_macs(arm("masked"), {**params, "mask_source": source})["components"] for source in ("logits", "features"))
    assert features["mask_heads"] < 0.3 * logits["mask_heads"]
    assert {**logits, "mask_heads": 0} == {**features, "mask_heads": 0}


@pytest.mark.parametrize(("size", "low", "high"), [("512x512", 66e9, 71e9), ("640x640", 102.5e9, 110e9), ("1024x2048", 519e9, 527e9)])
def test_mask2former_r50_has_the_published_arithmetic(size: str, low: float, high: float):
    params = {"scope": "model", "model": "mask2former_r50", "image_size": size, "classes": 150, "batch": 1}
    counted = count_macs(arm("masked"), params)
    assert low < counted["macs"] < high
    assert counted["parameters"] == pytest.approx(44.0e6, rel=0.005)
    assert "grid_sampler_2d" not in counted["uncounted"]
