"""Subjects of single operators, training steps and ceilings: they run what they say, and say what cannot run."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from dataclasses import asdict
from typing import Any

import pytest
import torch
from emca_kernels import pool_prototypes, select_prototypes
from emca_kernels.native import library

from emca_bench.errors import UsageError
from emca_bench.measure import kernels, worker
from emca_bench.measure.inputs import DTYPES, ImpossibleError, Maker
from emca_bench.measure.memory import peak_memory_bytes
from emca_bench.measure.subjects import Subject, build_subject, check_arm
from emca_bench.specs import CEILINGS, Arm, Settings

SELECT = {
    "scope": "kernel",
    "op": "select_prototypes",
    "pixels": "8x9",
    "queries": 5,
    "width": 16,
    "batch": 2,
    "mask": "bool",
    "allowed": 0.5,
}
POOL = {**SELECT, "op": "pool_prototypes"}
TRAINING = {"scope": "attention", "pixels": "8x8", "queries": 5, "width": 32, "batch": 2, "allowed": 0.3, "pass": "forward_backward"}


def arm(name: str = "eager", *, attention: str | None = None, **switches: Any) -> Arm:
    return Arm(name=name, attention=attention or name, switches=switches)


def inputs(params: dict[str, Any], seed: int) -> tuple[torch.Tensor, ...]:
    maker = Maker(dtype=DTYPES[str(params.get("dtype", "float32"))], device="cpu", seed=seed)
    features, queries = maker.normal(2, 72, 16), maker.normal(2, 5, 16)
    return features, queries, maker.mask(2, 5, 72, share=0.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_operators_run_on_the_same_inputs_for_all_arms(dtype: str, seed: int) -> None:
    params = {**SELECT, "dtype": dtype}
    given = inputs(params, seed)
    eager = build_subject(arm(backend="reference"), params, seed=seed)
    assert torch.equal(eager.call()[0], select_prototypes(*given, backend="reference")[0])
    scores = build_subject(arm("scores_only"), {**params, "op": "scores"}, seed=seed)
    assert torch.equal(scores.call(), torch.bmm(given[1], given[0].mT))


def test_work_is_that_of_the_specification() -> None:
    work = build_subject(arm(backend="reference"), {**SELECT, "dtype": "bfloat16"}, seed=0).work
    assert work is not None
    assert work.flops == 2 * 2 * 72 * 5 * 16
    assert work.bytes == 2 * (2 * 72 * 16 + 2 * 5 * 16) + 2 * 5 * 72 + 10 * (8 + 2)


def test_a_kind_of_mask_none_allows_everything(seed: int) -> None:
    open_everywhere = {**SELECT, "mask": "none"}
    found = build_subject(arm(backend="reference"), open_everywhere, seed=seed).call()
    features, queries, _ = inputs(open_everywhere, seed)
    assert torch.equal(found[0], select_prototypes(features, queries, backend="reference")[0])


def test_forward_backward_of_an_operator_returns_its_gradients_even_in_inference_mode(seed: int) -> None:
    subject = build_subject(arm(backend="reference"), {**POOL, "pass": "forward_backward"}, seed=seed)
    with torch.inference_mode():
        found = subject.call()
    features, queries, allowed = inputs(POOL, seed)
    again = Maker(dtype=torch.float32, device="cpu", seed=seed)
    _ = again.normal(2, 72, 16), again.normal(2, 5, 16), again.mask(2, 5, 72, share=0.5)
    upstream = again.normal(2, 5, 1, 16).double()
    leaves = features.double().requires_grad_(), queries.double().requires_grad_()
    wanted = torch.autograd.grad(pool_prototypes(*leaves, allowed, backend="reference"), leaves, upstream)
    for gradient, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=3e-5)


def test_the_whole_layer_is_an_operator_with_parameters(seed: int) -> None:
    layer = {**SELECT, "op": "emca_attention"}
    bare = build_subject(arm(backend="reference", bare=True), layer, seed=seed).call()
    assert torch.equal(build_subject(arm(backend="reference"), layer, seed=seed).call(), bare[0])
    gradients = build_subject(arm(backend="reference"), {**layer, "pass": "forward_backward"}, seed=seed).call()
    assert len(gradients) == 2 + 9
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("attention", ["masked", "masked_fused", "emca", "emca_soft"])
def test_a_training_step_reaches_features_and_parameters_and_leaves_nothing_behind(attention: str) -> None:
    subject = build_subject(arm(attention), TRAINING, seed=0)
    with torch.inference_mode():
        first, second = subject.call(), subject.call()
    assert subject.module.training
    assert len(first) == len(subject.kept) + 1
    for one, other, tensor in zip(first, second, subject.kept, strict=False):
        assert one is not None
        assert one.shape == tensor.shape
        assert torch.equal(one, other)
        assert tensor.grad is None
    assert first[0].abs().sum() > 0
    assert first[-1].shape == (2, 5, 32)


def extra_memory(attention: str, pixels: str) -> float:
    """Peak of a training step beyond gradients of features and parameters, in matrices of queries."""
    subject = build_subject(arm(attention), {**TRAINING, "pixels": pixels}, seed=0)
    gradients = sum(gradient.nbytes for gradient in subject.call()[: len(subject.kept)])
    return (peak_memory_bytes(subject.call, device="cpu") - gradients) / (2 * 5 * 32 * 4)


def test_a_training_step_of_emca_keeps_no_more_for_more_pixels() -> None:
    small, large = extra_memory("emca", "8x8"), extra_memory("emca", "64x64")
    assert large <= small + 1
    assert extra_memory("masked_fused", "64x64") > 10 * large


@pytest.mark.parametrize("op", CEILINGS)
def test_ceilings_do_what_they_count(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TRAFFIC_BYTES", 4096)
    monkeypatch.setattr(kernels, "BURST_ROUNDS", 1000)
    if op == "burst" and library.unavailable():
        pytest.skip(f"no native library: {library.unavailable()}")
    subject = build_subject(arm(op), {**SELECT, "op": op}, seed=0)
    assert subject.work is not None
    with torch.inference_mode():
        result = subject.call()
    expected = {
        "burst": lambda: (2 * int(result), 0),
        "matmul": lambda: (2 * kernels.MATMUL_SIZE**3, 3 * 4 * kernels.MATMUL_SIZE**2),
        "copy": lambda: (0, 8192),
        "read": lambda: (1024, 4096),
    }[op]()
    assert (subject.work.flops, subject.work.bytes) == expected
    if op == "copy":
        assert not result.any()


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "unavailable", lambda: "no ninja: pip install ninja")


def served(request: dict[str, Any]) -> dict[str, Any]:
    """The worker's answer to one request."""
    answers: list[dict[str, Any]] = []
    worker.serve(io.StringIO(json.dumps(request) + "\n"), answers.append, threads=1, device="cpu")
    return answers[-1]


@pytest.mark.parametrize("do", ["latency", "memory"])
@pytest.mark.parametrize(
    ("contender", "params"),
    [
        (arm("native", backend="native"), SELECT),
        (arm("bare", backend="native", bare=True), SELECT),
        (arm("native", backend="native"), {**POOL, "pass": "forward_backward"}),
        (arm("burst"), {**SELECT, "op": "burst"}),
        (arm("layer", attention="emca", backend="native"), TRAINING),
    ],
    ids=["operator", "bare", "training", "burst", "layer"],
)
@pytest.mark.usefixtures("no_library")
def test_without_the_library_native_cells_are_impossible_with_the_reason(do: str, contender: Arm, params: dict[str, Any]) -> None:
    worker._cached_subject.cache_clear()
    request = {"do": do, "arm": asdict(contender), "params": params, "settings": asdict(Settings(rounds=1))}
    result = served(request)
    assert result["status"] == "impossible"
    assert "no ninja: pip install ninja" in result["reason"]


def test_records_hold_the_work_and_the_gradients(seed: int) -> None:
    settings = asdict(Settings(rounds=1, min_seconds=0.0, min_samples=2, max_samples=2, seed=seed % 1000))
    latency = served({"do": "latency", "arm": asdict(arm(backend="reference")), "params": SELECT, "settings": settings})
    assert latency["values"]["flops"] == 23040
    assert latency["values"]["backends"] == {"select_prototypes": "reference (asked for by backend)"}
    assert len(latency["samples"]["latency_ms"]) == 2
    memory = served({"do": "memory", "arm": asdict(arm("emca")), "params": TRAINING, "settings": settings})
    parameters = 4 * (32 * 32 + 32) + 32
    assert memory["values"]["gradient_bytes"] == 4 * (2 * 64 * 32 + parameters)
    assert memory["values"]["peak_memory_bytes"] > memory["values"]["gradient_bytes"]


@pytest.mark.parametrize(
    ("wrong", "params", "words"),
    [
        (arm(backend="reference"), {**SELECT, "op": "select"}, "unknown operator 'select'"),
        (arm(backend="referense"), SELECT, "'referense' is no backend of select_prototypes (did you mean 'reference'?)"),
        (arm(backends="native"), SELECT, "no switch 'backends' (did you mean 'backend'?)"),
        (arm(backend="native"), {**SELECT, "pass": "forward_backward"}, "no pass 'forward_backward'; its passes: forward"),
        (arm(bare=True), SELECT, "bare=true needs a backend"),
        (arm("emca", backend="natif"), TRAINING, "backend='natif' (did you mean 'native'?); expected one of reference"),
    ],
)
def test_wrong_names_are_found_without_measuring(wrong: Arm, params: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_arm(wrong, params)
    assert words in str(caught.value)


def test_bare_calls_skip_the_choice_of_backend(seed: int) -> None:
    subject: Subject = build_subject(arm(backend="reference", bare=True), SELECT, seed=seed)
    assert torch.equal(subject.call()[0], select_prototypes(*inputs(SELECT, seed), backend="reference")[0])
    with pytest.raises(ImpossibleError, match="float64"):
        build_subject(arm(backend="native", bare=True), {**SELECT, "dtype": "float64"}, seed=seed)


DEFORMABLE = {"scope": "kernel", "op": "deformable_attention", "pixels": "8x12", "width": 16, "batch": 2}


@pytest.mark.parametrize("pass_", ["forward", "forward_backward"])
def test_both_forms_of_deformable_attention_get_the_same_samples(pass_: str, seed: int) -> None:
    given = {**DEFORMABLE, "dtype": "float64", "pass": pass_}
    plain, raw = (
        build_subject(arm(), {**given, "op": op}, seed=seed) for op in ("deformable_attention", "deformable_attention_from_offsets")
    )
    found, other = plain.call(), raw.call()
    if pass_ == "forward":
        assert found.shape == (2, 8 * 12 + 4 * 6 + 2 * 3, 16)
        torch.testing.assert_close(found, other)
    else:
        torch.testing.assert_close(found[0], other[0])
    assert plain.work is not None
    assert plain.work.flops == (1 if pass_ == "forward" else 3) * 2 * 4 * 2 * 126 * 12 * 16


RIVAL = {**DEFORMABLE, "op": "ms_deform_attn"}


def test_a_rival_that_is_not_installed_is_impossible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_ms_deform_attn", None)
    with pytest.raises(ImpossibleError, match=r"no torch-ms-deform-attn: .*it is on PyPI"):
        build_subject(arm(), RIVAL, seed=0)


@pytest.mark.skipif(importlib.util.find_spec("torch_ms_deform_attn") is None, reason="torch-ms-deform-attn is not installed")
def test_the_compiled_rival_agrees(seed: int) -> None:
    found, own = (build_subject(arm(), params, seed=seed).call() for params in (RIVAL, DEFORMABLE))
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "switches", "message"),
    [
        ({"pixels": "8x10"}, {}, "parameter 'pixels' is '8x10': the finest level of deformable attention must be whole at a quarter"),
        ({"width": 20}, {}, "parameter 'width' is 20, expected a multiple of the 8 heads"),
        ({}, {"backend": "cuda"}, "'cuda' is no backend of deformable_attention"),
        ({}, {"backend": "native", "bare": True}, "operator deformable_attention has no bare form"),
        ({"op": "select_prototypes"}, {}, "operator select_prototypes needs the parameter 'queries'"),
    ],
)
def test_what_deformable_attention_cannot_be_asked(changes: dict[str, Any], switches: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_arm(arm(**switches), {**DEFORMABLE, **changes})
    assert message in str(caught.value)
