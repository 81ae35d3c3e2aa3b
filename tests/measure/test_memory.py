from __future__ import annotations

import io
import json
from dataclasses import asdict
from typing import Any

import pytest
import torch

from emca_bench.measure import worker
from emca_bench.measure.memory import peak_memory_bytes
from emca_bench.measure.subjects import build_subject
from emca_bench.specs import Arm, Settings

MIB = 2**20


def test_peak_counts_what_lives_at_the_same_time():
    source = torch.zeros(MIB)

    def call() -> torch.Tensor:
        first = source + 1
        second = first * 2
        del first
        return second + 1

    assert peak_memory_bytes(call, device="cpu") == pytest.approx(8 * MIB, rel=0.01)


def test_inputs_and_views_are_free():
    source = torch.zeros(MIB)
    assert peak_memory_bytes(lambda: source[:10].view(5, 2), device="cpu") < 1024


def test_masked_attention_as_published_writes_its_weights():
    params = {"scope": "attention", "pixels": "32x32", "queries": 100, "width": 64, "batch": 1, "allowed": 0.5}
    published, emca = (
        peak_memory_bytes(build_subject(Arm(name=name, attention=name), params, seed=0).call, device="cpu") for name in ("masked", "emca")
    )
    weights = 8 * 100 * 1024 * 4
    assert published > weights > emca


def test_memory_that_no_counter_sees_is_not_measured() -> None:
    params = {"scope": "end_to_end", "model": "mask2former_tiny", "image_size": "64x64", "classes": 3, "batch": 1, "runtime": "onnxruntime"}
    arm = asdict(Arm(name="masked_onnxruntime", attention="masked", switches={}, overrides={"runtime": "onnxruntime"}))
    answers: list[dict[str, Any]] = []
    request = {"do": "memory", "arm": arm, "params": params, "settings": asdict(Settings(rounds=1))}
    worker.serve(io.StringIO(json.dumps(request) + "\n"), answers.append, threads=1, device="cpu")
    assert answers[-1]["status"] == "impossible"
    assert "onnxruntime allocates beside torch" in answers[-1]["reason"]
