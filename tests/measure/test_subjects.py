from __future__ import annotations

import sys
from functools import partial

import pytest
import torch

from emca_bench.errors import UsageError
from emca_bench.measure.inputs import ImpossibleError
from emca_bench.measure.subjects import build_subject, check_arm, model_overrides
from emca_bench.models import build_model
from emca_bench.specs import Arm

ATTENTION = {"scope": "attention", "pixels": "8x8", "queries": 5, "width": 32, "batch": 2, "allowed": 0.3}
MODEL = {"model": "mask2former_tiny", "image_size": "65x97", "classes": 3, "batch": 2}


def arm(attention: str, **switches: object) -> Arm:
    return Arm(name=attention, attention=attention, switches=switches)  # type: ignore[arg-type]


def test_rivals_get_the_same_inputs():
    one = build_subject(arm("masked"), ATTENTION, seed=3).call()
    other = build_subject(arm("masked_fused"), ATTENTION, seed=3).call()
    assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("scope", ["decoder", "model", "end_to_end"])
def test_scopes_return_what_they_say(scope: str):
    result = build_subject(arm("emca"), {**MODEL, "scope": scope}, seed=0).call()
    if scope == "end_to_end":
        assert result.shape == (2, 65, 97)
        assert result.dtype == torch.int64
    else:
        assert result.class_logits.shape == (2, 20, 4)
        assert result.mask_logits.shape == (2, 20, 24, 32)


def test_a_runtime_that_is_not_installed_makes_its_own_row_impossible(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.startswith(("emca_bench.integrations.transformers", "transformers"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)  # type: ignore[arg-type]
    theirs = Arm(name="hugging_face", attention="masked", switches={}, overrides={"runtime": "transformers"})
    with pytest.raises(ImpossibleError, match=r"pip install 'emca-bench\[transformers\]'"):
        build_subject(theirs, {**MODEL, "scope": "end_to_end", "runtime": "transformers"}, seed=0)


def test_decoder_is_measured_on_what_the_pixel_decoder_hands_over():
    decoder, model = (build_subject(arm("masked"), {**MODEL, "scope": scope}, seed=4).call() for scope in ("decoder", "model"))
    assert torch.equal(decoder.class_logits, model.class_logits)
    assert torch.equal(decoder.mask_logits, model.mask_logits)


def test_the_mask_rule_of_a_study_reaches_the_decoder():
    overrides = model_overrides(arm("emca"), {**MODEL, "mask_rule": "winner"})
    assert build_model("mask2former_tiny", num_classes=3, **overrides).sem_seg_head.predictor.mask_rule == "winner"
    threshold, winner = (
        build_subject(arm("emca"), {**MODEL, "scope": "decoder", **rule}, seed=4) for rule in ({}, {"mask_rule": "winner"})
    )
    assert not torch.equal(threshold.call().mask_logits, winner.call().mask_logits)


@pytest.mark.parametrize("scope", ["decoder", "model", "end_to_end"])
def test_the_optimized_runtime_has_the_weights_of_the_eager_one(scope: str):
    eager, faster = (
        build_subject(arm("none"), {**MODEL, "scope": scope, "runtime": runtime}, seed=5).call() for runtime in ("eager", "optimized")
    )
    if scope == "end_to_end":
        assert (eager == faster).double().mean() >= 0.999
    else:
        assert torch.allclose(eager.mask_logits, faster.mask_logits, atol=1e-4 * float(eager.mask_logits.abs().max()))


def test_a_runtime_without_a_decoder_of_its_own_is_impossible():
    with pytest.raises(ImpossibleError, match="runtime transformers has no mask decoder"):
        build_subject(arm("masked"), {**MODEL, "model": "mask2former_r50", "scope": "decoder", "runtime": "transformers"}, seed=0)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_dtypes_reach_weights_and_inputs(dtype: str):
    assert build_subject(arm("emca_soft"), {**ATTENTION, "dtype": dtype}, seed=0).call().dtype == getattr(torch, dtype)


def test_more_prototypes_than_pixels_is_impossible():
    with pytest.raises(ImpossibleError, match="K=70 prototypes from P=64 pixels"):
        build_subject(arm("emca", prototypes=70, selection="topk_mean"), ATTENTION, seed=0)


def test_missing_device_is_impossible():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ImpossibleError, match="no CUDA device"):
        build_subject(arm("emca"), {**ATTENTION, "device": "cuda"}, seed=0)


@pytest.mark.parametrize(
    ("wrong", "params", "words"),
    [
        (arm("emac"), ATTENTION, "did you mean 'emca'"),
        (arm("emca", fold=True), ATTENTION, "did you mean 'folded'"),
        (arm("emca", residual="row"), ATTENTION, "did you mean 'raw'"),
        (arm("emca", heads=5), ATTENTION, "heads=5 must divide the model width 32"),
        (arm("emca"), {**MODEL, "scope": "model", "model": "mask2former_r500"}, "did you mean 'mask2former_r50'"),
        (arm("emca"), {**MODEL, "scope": "model", "frozen": True}, "no override 'frozen'"),
        (arm("emca"), {**MODEL, "scope": "model", "mask_source": "feature"}, "did you mean 'features'"),
    ],
)
def test_wrong_names_are_found_without_measuring(wrong: Arm, params: dict[str, object], words: str):
    with pytest.raises(UsageError, match=words):
        check_arm(wrong, params)


@pytest.mark.parametrize(("attention", "switches"), [("masked_fused", {}), ("emca", {"backend": "reference", "folded": False})])
def test_a_compiled_arm_computes_the_same(attention: str, switches: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as it will be, without the minutes of a code generator."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    check_arm(arm(attention, compile=True, **switches), ATTENTION)
    with torch.inference_mode():
        found = build_subject(arm(attention, compile=True, **switches), ATTENTION, seed=3).call()
        torch.testing.assert_close(found, build_subject(arm(attention, **switches), ATTENTION, seed=3).call())


def test_a_compiled_arm_runs_forward_only() -> None:
    with pytest.raises(ImpossibleError, match="compiled arms run forward only"):
        build_subject(arm("masked_fused", compile=True), {**ATTENTION, "pass": "forward_backward"}, seed=0)


def test_a_compiler_that_fails_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=fail))
    with pytest.raises(ImpossibleError, match="no C\\+\\+ compiler"):
        build_subject(arm("masked_fused", compile=True), ATTENTION, seed=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")  # right, and slow
def test_flex_attention_computes_the_same() -> None:
    with torch.inference_mode():
        found, fused = (build_subject(arm(name), ATTENTION, seed=3).call() for name in ("masked_flex", "masked_fused"))
    torch.testing.assert_close(found, fused)
