from __future__ import annotations

import time

import pytest
import torch

from emca_bench import stats
from emca_bench.measure.latency import cpu_timer, sample_latency
from emca_bench.specs import Settings


def test_timer_reads_a_known_time():
    readings = [cpu_timer(lambda: time.sleep(0.02)) for _ in range(5)]
    assert 20.0 <= min(readings) < 24.0


@pytest.mark.parametrize(
    ("settings", "seconds_a_call", "expected"),
    [
        (Settings(min_samples=3, max_samples=50, min_seconds=0.0), 1.0, 3),
        (Settings(min_samples=3, max_samples=50, min_seconds=0.1), 0.01, 10),
        (Settings(min_samples=3, max_samples=5, min_seconds=9.0), 0.01, 5),
    ],
    ids=["fewest", "until the time is up", "most"],
)
def test_samples_go_on_until_the_settings_are_met(settings: Settings, seconds_a_call: float, expected: int):
    calls = []

    def fake_timer(call: object) -> float:
        calls.append(call)
        return 1e3 * seconds_a_call

    samples, joules = sample_latency(lambda: None, settings, timer=fake_timer, warmups=2)
    assert len(samples) == expected
    assert joules is None
    assert len(calls) == expected + 2


def test_samples_are_raw_and_in_order():
    readings = iter([9.0, 9.0, 3.0, 1.0, 2.0])
    samples, _ = sample_latency(lambda: None, Settings(min_samples=3, max_samples=3), timer=lambda call: next(readings), warmups=2)
    assert samples == [3.0, 1.0, 2.0]


def test_eight_times_the_work_is_slower():
    """So much that a busy machine changes nothing about it."""
    matrix = torch.randn(256, 256)
    settings = Settings(min_samples=5, max_samples=64, min_seconds=0.01)
    rounds: dict[str, dict[int, float]] = {"once": {}, "eight times": {}}
    calls = {"once": lambda: matrix @ matrix, "eight times": lambda: [matrix @ matrix for _ in range(8)]}
    for number in range(15):
        for name, call in calls.items():
            samples, _ = sample_latency(call, settings)
            rounds[name][number] = sorted(samples)[len(samples) // 2]
    assert stats.speed_verdict(stats.paired_ratio(rounds["once"], rounds["eight times"])) == "slower"
