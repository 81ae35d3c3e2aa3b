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
    assert eta.seconds([Running("slow", 1, 30.0, 0.25)]) == (pytest.approx(90.0 + 120.0), 0)


def test_eta_of_a_resumed_task_counts_what_was_done_since():
    """From 40 % to 60 % in 10 seconds: 20 to go, and 50 for another one."""
    eta = Eta([("slow", 1), ("slow", 2)])
    assert eta.seconds([Running("slow", 1, 10.0, 0.6, 0.4)]) == (pytest.approx(20.0 + 50.0), 0)
    assert eta.seconds([Running("slow", 1, 10.0, 0.4, 0.4)]) == (0.0, 2)


def test_a_resumed_task_says_so_by_its_first_share(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr("emca_bench.progress.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with Progress([("accuracy", name) for name in "ab"], stream=stream) as progress:
        progress.start("accuracy", "a", "cell a")
        now[0] = 10.0
        progress.update("a", 0.5, "step 5/10")
        now[0] = 20.0
        progress.update("a", 0.75, "step 8/10")
        now[0] = 30.0
        progress.finish("a")
    # a quarter in 20 seconds; half of it in 30, and so the other one in 60
    assert [line.split(" | ")[0] for line in stream.getvalue().splitlines()] == [
        "[0/2] to go ?",
        "[0/2] to go ?",
        "[0/2] to go 1:40",
        "[1/2] to go 1:00",
    ]


def test_eta_shares_what_is_done_side_by_side():
    """Four of 100 seconds, two at once: one is at 40 %, the other at 60 %; the last one alone sets the end."""
    eta = Eta([("slow", number) for number in range(4)], {"slow": 2})
    running = [Running("slow", 0, 40.0, 0.4), Running("slow", 1, 60.0, 0.6)]
    assert eta.seconds(running) == (pytest.approx((60 + 40 + 100 + 100) / 2), 0)
    for number in range(3):
        eta.finished("slow", number, 100.0)
    assert eta.seconds([Running("slow", 3, 10.0, 0.1)]) == (pytest.approx(90.0), 0)


def test_plain_lines_tell_count_time_and_label():
    stream = io.StringIO()
    with Progress([("macs", "a"), ("macs", "b")], stream=stream) as progress:
        for name in "ab":
            progress.start("macs", name, f"cell {name}")
            progress.update(name, 0.5, "half")
            progress.finish(name)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("[0/2] to go ? | cell a")
    assert lines[-1].startswith("[2/2] to go 0:00")


def test_several_under_way_stand_in_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("emca_bench.progress.PLAIN_SECONDS", 0.0)
    stream = io.StringIO()
    with Progress([("accuracy", name) for name in "abc"], at_once={"accuracy": 2}, stream=stream) as progress:
        progress.start("accuracy", "a", "cell a")
        progress.start("accuracy", "b", "cell b")
        progress.update("a", 0.25, "step 1/4")
        progress.update("b", 0.5, "step 2/4")
        progress.finish("b")
    lines = stream.getvalue().splitlines()
    assert lines[3].startswith("[0/3] to go ")
    assert lines[3].endswith(" | 2 at once: 25% 50% | cell b: step 2/4")
    assert lines[4].startswith("[1/3] to go ")
    assert lines[4].endswith(" | cell b")


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (65.2, "1:05"), (3661, "1:01:01")])
def test_clock(seconds: float, text: str):
    assert clock(seconds) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_that_cannot_draw_gets_lines(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Progress([("macs", "a")], stream=stream) as progress:
        progress.start("macs", "a", "cell a")
    assert stream.getvalue() == "[0/1] to go ? | cell a\n"


def test_a_terminal_gets_a_bar_and_notes_that_stay(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Progress([("macs", "a"), ("macs", "b")], stream=stream) as progress:
        for name in "ab":
            progress.start("macs", name, f"cell {name}")
            progress.update(name, 0.5, "half")
            progress.finish(name)
        progress.note("failed: cell [b]: [reason]")
    shown = stream.getvalue()
    assert "2/2" in shown
    assert "cell a: half" in shown
    assert "failed: cell [b]: [reason]" in shown


def test_a_terminal_gets_a_line_for_each_under_way(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Progress([("accuracy", name) for name in "abc"], at_once={"accuracy": 2}, stream=stream) as progress:
        progress.start("accuracy", "a", "cell [a]")
        progress.start("accuracy", "b", "cell b")
        progress.update("a", 0.25, "step 1/4")
        shown = stream.getvalue()
        assert "0/3" in shown
        assert "25%" in shown
        assert "cell [a]: step 1/4" in shown
        assert "cell b" in shown
        progress.finish("a")
        assert "1/3" in stream.getvalue()
