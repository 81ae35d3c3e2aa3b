from __future__ import annotations

import io

import pytest

from emca_bench.progress import Eta, Progress, Running, clock


def test_eta_is_unknown_until_every_kind_was_measured():
    eta = Eta([("fast", 1), ("fast", 2), ("slow", 3)])
    assert eta.seconds() is None
    eta.finished("fast", 1, 2.0)
    assert eta.seconds() is None
    eta.finished("slow", 3, 10.0)
    assert eta.seconds() == pytest.approx(2.0)


def test_eta_uses_the_last_time_of_the_same_task():
    eta = Eta([("fast", 1), ("fast", 2), ("fast", 1), ("fast", 2)])
    eta.finished("fast", 1, 2.0)
    eta.finished("fast", 2, 6.0)
    assert eta.seconds() == pytest.approx(8.0)
    eta.finished("fast", 1, 3.0)
    assert eta.seconds() == pytest.approx(6.0)


def test_eta_extrapolates_the_task_under_way():
    eta = Eta([("slow", 1), ("slow", 2)])
    assert eta.seconds(Running("slow", 1, 30.0, 0.25)) == pytest.approx(90.0 + 120.0)


def test_plain_lines_tell_count_time_and_label():
    stream = io.StringIO()
    with Progress([("macs", "a"), ("macs", "b")], stream=stream) as progress:
        for name in "ab":
            progress.start("macs", name, f"cell {name}")
            progress.update(0.5, "half")
            progress.finish()
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("[0/2] to go ? | cell a")
    assert lines[-1].startswith("[2/2] to go 0:00")


@pytest.mark.parametrize(("seconds", "text"), [(None, "?"), (5, "0:05"), (65.2, "1:05"), (3661, "1:01:01")])
def test_clock(seconds: float | None, text: str):
    assert clock(seconds) == text
