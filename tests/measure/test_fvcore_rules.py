"""The rules against fvcore itself, and what leads from torch's counter to it."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emca_bench.measure.flops import count_macs
from emca_bench.measure.subjects import Subject, build_subject
from emca_bench.models import Predictions
from emca_bench.specs import Arm, Expected, find_study, load_studies

QUERIES, WIDTH = 100, 256


class Call(nn.Module):
    """A subject as a module that fvcore can trace."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.subject, self.call = subject.module, subject.call

    def forward(self) -> Tensor | tuple[Tensor, Tensor]:
        result = self.call()
        return (result.class_logits, result.mask_logits) if isinstance(result, Predictions) else result


def trace(attention: str, params: dict[str, Any]) -> Any:
    """fvcore's own analysis, traced on the CPU."""
    subject = build_subject(Arm(name=attention, attention=attention), params, seed=0)
    with torch.no_grad(), warnings.catch_warnings():
        # fvcore uses names that torch deprecates; the tracer warns of every size that becomes a constant
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(Call(subject), ()).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.set_op_handle("emca::deformable_attention_from_offsets", as_grid_samples)
        analysis.total()
    return analysis


def as_grid_samples(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """What fvcore says of `grid_sample`, four a sampled number, for the operator in its place: an output is a sum of L * N samples."""
    logits = inputs[4].type().sizes()
    return Counter(samples=4 * math.prod(outputs[0].type().sizes()) * math.prod(logits[3:]))


def untraced_class_heads(params: dict[str, Any], layers: int, queries: int, width: int) -> int:
    """The trace leaves out what no result depends on: in evaluation the class heads of all but the last prediction."""
    return layers * queries * width * (params["classes"] + 1)


@pytest.mark.parametrize("attention", ["masked", "masked_fused", "emca", "emca_soft", "pem_ca"])
@pytest.mark.parametrize("scope", ["model", "end_to_end"])
def test_the_rules_are_fvcore_s(scope: str, attention: str) -> None:
    params = {"scope": scope, "model": "mask2former_tiny", "image_size": "96x128", "classes": 19, "batch": 1, "mask_source": "logits"}
    found = count_macs(Arm(name=attention, attention=attention), params)["fvcore"]["macs"]
    found -= untraced_class_heads(params, layers=3, queries=20, width=64)
    # fvcore rounds einsums to four digits
    assert found == pytest.approx(trace(attention, params).total(), rel=2e-4)


@pytest.mark.parametrize(
    ("model", "attention", "image_size", "layers"),
    [
        ("mask2former_r50", "masked", "512x512", 9),
        ("mask2former_r50", "masked_fused", "96x160", 9),
        ("mask2former_swin_tiny", "masked", "96x160", 9),
        ("pem_r50", "pem_ca_published", "96x160", 6),
    ],
)
def test_the_rules_are_fvcore_s_operator_by_operator(model: str, attention: str, image_size: str, layers: int) -> None:
    params = {"scope": "model", "model": model, "image_size": image_size, "classes": 150, "batch": 1}
    fvcore = trace(attention, params)
    rules = count_macs(Arm(name=attention, attention=attention), params)["fvcore"]
    total = rules["macs"] - untraced_class_heads(params, layers, QUERIES, WIDTH)
    assert total == pytest.approx(fvcore.total(), rel=1e-5)
    named = {"batch_norm": "native_batch_norm", "layer_norm": "native_layer_norm", "group_norm": "native_group_norm"}
    named |= {"grid_sampler": "grid_sampler_2d", "upsample_bilinear2d": "upsample_bilinear2d"}
    counted = fvcore.by_operator()
    assert rules["added"] == {ours: counted[theirs] for theirs, ours in named.items() if counted[theirs]}
    unsupported = fvcore.unsupported_ops()
    known = {"baddbmm": "aten", "scaled_dot_product_attention": "aten", "select_prototypes": "emca", "pool_prototypes": "emca"}
    assert set(rules["dropped"]) == {name for name, library in known.items() if unsupported[f"{library}::{name}"]}
    modules = fvcore.by_module()
    assert rules["components"]["backbone"] == modules["subject.backbone"]
    assert rules["components"]["pixel_decoder"] == modules["subject.sem_seg_head.pixel_decoder"]


@pytest.mark.parametrize("scope", ["attention", "decoder", "model", "end_to_end"])
@pytest.mark.parametrize("attention", ["masked", "masked_fused", "emca"])
def test_what_is_added_and_dropped_leads_from_one_counter_to_the_other(attention: str, scope: str) -> None:
    params: dict[str, Any] = {"scope": scope, "batch": 2, "pixels": "12x20", "queries": 30, "width": 64}
    if scope != "attention":
        params = {"scope": scope, "batch": 2, "model": "mask2former_tiny", "image_size": "96x160", "classes": 19}
    counted = count_macs(Arm(name=attention, attention=attention), params)
    rules = counted["fvcore"]
    assert counted["macs"] + sum(rules["added"].values()) - sum(rules["dropped"].values()) == rules["macs"]
    assert sum(rules["components"].values()) == rules["macs"]


def test_masked_attention_loses_its_scores_and_fused_attention_both_products() -> None:
    params = {"scope": "attention", "pixels": "64x64", "queries": QUERIES, "width": WIDTH, "batch": 1}
    dropped = {name: count_macs(Arm(name=name, attention=name), params)["fvcore"]["dropped"] for name in ("masked", "masked_fused", "emca")}
    product = QUERIES * 64 * 64 * WIDTH
    wanted = {"masked": {"baddbmm": product}, "masked_fused": {"scaled_dot_product_attention": 2 * product}}
    # scores, and five projections of the queries: one operator that the other counter does not know
    assert dropped == wanted | {"emca": {"emca_attention": product + 5 * QUERIES * WIDTH**2}}


@pytest.mark.parametrize(
    ("image_size", "classes", "counted", "by_the_rules", "published"),
    [
        ("512x512", 150, 66.73, 70.58, (66, 71)),
        ("640x640", 150, 103.38, 109.36, (102.7, 110)),
        ("1024x2048", 19, 522.72, 526.44, (519, 527)),
    ],
)
def test_the_two_counters_are_the_ends_of_the_published_figures(
    image_size: str, classes: int, counted: float, by_the_rules: float, published: tuple[float, float]
) -> None:
    """Low: torch's counter on the model alone. High: fvcore's rules with semantic inference, as papers count."""
    params = {"model": "mask2former_r50", "image_size": image_size, "classes": classes, "batch": 1}
    masked = Arm(name="masked", attention="masked")
    low = count_macs(masked, {"scope": "model", **params})["macs"] / 1e9
    high = count_macs(masked, {"scope": "end_to_end", **params})["fvcore"]["macs"] / 1e9
    assert low == pytest.approx(counted, rel=1e-3)
    assert high == pytest.approx(by_the_rules, rel=1e-3)
    assert published[0] <= low < high <= published[1]


def test_the_breakdown_of_mask2former_r50_by_both_counters() -> None:
    """fvcore's column is what it says of the original code at 512x512, in 1e9: 21.5, 36.8 and 2.65 of cross-attention."""
    params = {"scope": "model", "model": "mask2former_r50", "image_size": "512x512", "classes": 150, "batch": 1}
    counted = count_macs(Arm(name="masked", attention="masked"), params)
    wanted = {"backbone": (21.35, 21.47), "pixel_decoder": (36.67, 36.81), "cross_attention": (3.058, 2.645)}
    wanted |= {"self_attention": (0.2820, 0.2371), "ffn": (0.9437, 0.9449), "mask_heads": (4.430, 4.438)}
    for component, (torch_s, fvcore_s) in wanted.items():
        assert counted["components"][component] / 1e9 == pytest.approx(torch_s, rel=1e-3), component
        assert counted["fvcore"]["components"][component] / 1e9 == pytest.approx(fvcore_s, rel=1e-3), component
    assert wanted.keys() == counted["components"].keys() == counted["fvcore"]["components"].keys()


PUBLISHED = [claim for study in load_studies(find_study("published")) for claim in study.expected]


@pytest.mark.parametrize("claim", [claim for claim in PUBLISHED if claim.arm.startswith("pem")], ids=lambda claim: claim.arm)
def test_pem_has_the_published_arithmetic_but_for_one_table(claim: Expected) -> None:
    """The 46.9 G of ADE20K semantic segmentation belong to images of 640x640; those of its test size take 26 % less."""
    (study,) = load_studies(find_study("published"))
    (cell,) = [cell for cell in study.cells() if cell.arm.name == claim.arm]
    found = count_macs(cell.arm, cell.params)["fvcore"]["macs"] / 1e9
    if claim.arm == "pem_ade_semantic":
        assert found == pytest.approx(0.74 * claim.value, rel=0.01)
    else:
        assert found == pytest.approx(claim.value, rel=claim.tolerance)
