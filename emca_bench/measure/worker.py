"""The process that measures: requests come in as JSON lines on standard input, answers go out as JSON lines.

It is a process of its own so that the progress display never runs inside a timed region, and so that a crash costs one cell. Run as
`python -m emca_bench.measure.worker THREADS DEVICE`.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache, lru_cache
from pathlib import Path
from typing import IO, Any

import torch
from emca_kernels.backends import RefusedError, record_backends

from emca_bench.environment import collect_environment
from emca_bench.errors import UsageError
from emca_bench.measure.accuracy import check_data, measure_accuracy
from emca_bench.measure.components import component_ms
from emca_bench.measure.energy import find_meter
from emca_bench.measure.flops import count_macs
from emca_bench.measure.inputs import ImpossibleError
from emca_bench.measure.latency import cpu_timer, cuda_timer, sample_latency
from emca_bench.measure.mechanism import measure_mechanism
from emca_bench.measure.memory import peak_memory_bytes
from emca_bench.measure.subjects import Subject, build_subject, check_arm
from emca_bench.specs import MODEL_SCOPES, Arm, Settings, canonical_json
from emca_bench.train.state import CheckpointWriteError

PROGRESS_SECONDS = 0.5
"""Least time between two progress messages."""

Answer = Callable[[dict[str, Any]], None]


def main() -> None:
    """Answer requests until standard input ends."""
    threads, device = int(sys.argv[1]), sys.argv[2]
    # libraries that print must not break the protocol
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(threads)

    def answer(message: dict[str, Any]) -> None:
        out.write(canonical_json(message) + "\n")
        out.flush()

    try:
        serve(sys.stdin, answer, threads=threads, device=device)
    except BrokenPipeError:
        # the parent is gone, nobody waits for an answer
        os._exit(1)


def serve(requests: IO[str], answer: Answer, *, threads: int, device: str) -> None:
    """Answer each request with progress messages and one result or error."""
    try:
        answer({"kind": "ready", **collect_environment(threads=threads, device=device)})
    except UsageError as error:
        answer({"kind": "usage", "message": str(error)})
        return
    for line in requests:
        request = json.loads(line)
        started = time.perf_counter()
        try:
            result = HANDLERS[request["do"]](request, answer)
            answer({"kind": "result", "status": "ok", "duration_s": time.perf_counter() - started, **result})
        except (ImpossibleError, RefusedError) as error:
            answer({"kind": "result", "status": "impossible", "reason": str(error), "duration_s": time.perf_counter() - started})
        except (UsageError, CheckpointWriteError) as error:
            # with a full disk the next cell would train a minute for nothing
            answer({"kind": "usage", "message": str(error)})
        except BrokenPipeError:
            raise
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
            answer({"kind": "result", "status": "failed", "reason": reason, "duration_s": time.perf_counter() - started})


def _check(request: Mapping[str, Any], answer: Answer) -> dict[str, Any]:
    arm, params = Arm(**request["arm"]), request["params"]
    check_arm(arm, params)
    if "dataset" in params:
        check_data(params)
    return {}


def _macs(request: Mapping[str, Any], answer: Answer) -> dict[str, Any]:
    return {"values": count_macs(Arm(**request["arm"]), request["params"])}


def _latency(request: Mapping[str, Any], answer: Answer) -> dict[str, Any]:
    settings = Settings(**request["settings"])
    device = str(request["params"].get("device", "cpu"))
    values: dict[str, Any] = {}
    subject = _subject(request, settings)
    # a warm-up too: it compiles, tunes and fills caches
    with torch.inference_mode(), record_backends() as values["backends"]:
        subject.call()
    meter, values["no_energy"] = find_meter(device)
    timer = cuda_timer if device == "cuda" else cpu_timer
    samples, joules = sample_latency(subject.call, settings, timer=timer, warmups=1, meter=meter)
    if joules is not None:
        values["energy_per_image_j"] = joules / (len(samples) * subject.batch)
    if request["params"]["scope"] in MODEL_SCOPES:
        values["component_ms"] = _components(canonical_json(request["arm"]), canonical_json(request["params"]), settings.seed)
    values |= {} if subject.work is None else asdict(subject.work)
    kept = {name: value for name, value in values.items() if value not in (None, {}) or name == "backends"}
    return {"samples": {"latency_ms": [round(sample, 6) for sample in samples]}, "values": kept}


def _memory(request: Mapping[str, Any], answer: Answer) -> dict[str, Any]:
    if request["params"].get("runtime") == "onnxruntime":
        raise ImpossibleError("onnxruntime allocates beside torch, whose counters are read")
    subject = _subject(request, Settings(**request["settings"]))
    values = {"peak_memory_bytes": peak_memory_bytes(subject.call, device=str(request["params"].get("device", "cpu")))}
    if subject.kept:
        gradients = subject.call()[: len(subject.kept)]
        values["gradient_bytes"] = sum(gradient.nbytes for gradient in gradients if gradient is not None)
    return {"values": values}


def _mechanism(request: Mapping[str, Any], answer: Answer) -> dict[str, Any]:
    return measure_mechanism(Arm(**request["arm"]), request["params"], on_progress=_told(answer))


def _accuracy(request: Mapping[str, Any], answer: Answer) -> dict[str, Any]:
    return measure_accuracy(
        Arm(**request["arm"]),
        request["params"],
        key=request["key"],
        artifacts=Path(request["artifacts"]),
        checkpoint=Path(request["checkpoint"]),
        on_progress=_told(answer),
    )


def _told(answer: Answer) -> Callable[[int, int, str], None]:
    """Passes progress on, from time to time."""
    last = 0.0

    def on_progress(done: int, total: int, text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_SECONDS or done == total:
            last = now
            answer({"kind": "progress", "done": done, "total": total, "text": text})

    return on_progress


def _subject(request: Mapping[str, Any], settings: Settings) -> Subject:
    return _cached_subject(canonical_json(request["arm"]), canonical_json(request["params"]), settings.seed)


# a study's subjects stay built over its rounds; the largest, R50 at 1024x2048, takes 0.6 GiB
@lru_cache(maxsize=64)
def _cached_subject(arm: str, params: str, seed: int) -> Subject:
    return build_subject(Arm(**json.loads(arm)), json.loads(params), seed=seed)


# once per subject is enough: it explains a number and is none itself
@cache
def _components(arm: str, params: str, seed: int) -> dict[str, float]:
    subject = _cached_subject(arm, params, seed)
    return component_ms(subject.module, subject.call, device=str(json.loads(params).get("device", "cpu")))


HANDLERS: dict[str, Callable[[Mapping[str, Any], Answer], dict[str, Any]]] = {
    "check": _check,
    "macs": _macs,
    "latency": _latency,
    "memory": _memory,
    "accuracy": _accuracy,
    "mechanism": _mechanism,
}

if __name__ == "__main__":
    main()
