"""Time of a call: warmed up, repeated, raw samples kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from emca_bench.measure.energy import Meter
from emca_bench.specs import Settings


class Timer(Protocol):
    """Measures one call in milliseconds."""

    def __call__(self, call: Callable[[], Any]) -> float:
        """Run `call` once and return how long it took, its device work included."""


def cpu_timer(call: Callable[[], Any]) -> float:
    """Wall time in milliseconds."""
    started = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started)


def cuda_timer(call: Callable[[], Any]) -> float:
    """Time between two events on the current CUDA stream in milliseconds."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


@torch.inference_mode()
def sample_latency(
    call: Callable[[], Any], settings: Settings, *, timer: Timer = cpu_timer, warmups: int = 2, meter: Meter | None = None
) -> tuple[list[float], float | None]:
    """Milliseconds of repeated calls after warm-up, as many as the settings ask for, and the joules of all of them together.

    Args:
        call: what is measured.
        settings: least time and number of samples.
        timer: `cpu_timer` or `cuda_timer`.
        warmups: calls before the first sample; allocators, caches and autotuning settle.
        meter: of energy; None where there is none, and then there are no joules.
    """
    for _ in range(warmups):
        timer(call)
    samples: list[float] = []
    begin = meter.read() if meter else ()
    while len(samples) < settings.max_samples and (len(samples) < settings.min_samples or sum(samples) < 1e3 * settings.min_seconds):
        samples.append(timer(call))
    return samples, meter.joules(begin, meter.read()) if meter else None
