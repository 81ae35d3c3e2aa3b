from __future__ import annotations

import io

import pytest

from emca_bench.progress import Eta, Progress, Running, clock


def test_eta_is_a_lower_bound_until_every_kind_was_measured():
    eta = Eta([("fast", 1), ("fast", 2), ("slow", 3)])
    assert eta.text() == "?"
    eta.finished("fast", 1, 2.0)
    assert eta.seconds() == (pytest.approx(2.0), 1)
    assert eta.text() == "at least 0:02"
    eta.finished("slow", 3, 10.0)
    assert eta.seconds() == (pytest.approx(2.0), 0)
    assert eta.text() == "0:02"


def test_eta_uses_the_last_time_of_the_same_task():
    eta = Eta([("fast", 1), ("fast", 2), ("fast", 1), ("fast", 2)])
    eta.finished("fast", 1, 2.0)
    eta.finished("fast", 2, 6.0)
    assert eta.seconds()[0] == pytest.approx(8.0)
    eta.finished("fast", 1, 3.0)
    assert eta.seconds()[0] == pytest.approx(6.0)


def test_eta_extrapolates_the_task_under_way():
    eta = Eta([("slow", 1), ("slow", 2)])
    assert eta.seconds(Running("slow", 1, 30.0, 0.25)) == (pytest.approx(90.0 + 120.0), 0)


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


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (65.2, "1:05"), (3661, "1:01:01")])
def test_clock(seconds: float, text: str):
    assert clock(seconds) == text


def test_a_terminal_gets_a_bar_and_notes_that_stay():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress([("macs", "a"), ("macs", "b")], stream=stream) as progress:
        for name in "ab":
            progress.start("macs", name, f"cell {name}")
            progress.update(0.5, "half")
            progress.finish()
        progress.note("failed: cell [b]: [reason]")
    shown = stream.getvalue()
    assert "2/2" in shown
    assert "cell a: half" in shown
    assert "failed: cell [b]: [reason]" in shown
