"""How far a run is: a bar with time to go on a terminal, plain lines elsewhere. Standard library and rich."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from statistics import fmean
from types import TracebackType
from typing import TextIO

PLAIN_SECONDS = 5.0
"""Least time between two plain lines within one task."""


@dataclass(frozen=True)
class Running:
    """The task under way: its kind and identity, seconds so far, and the share of 0..1 that is done."""

    kind: str
    identity: Hashable
    seconds: float
    share: float


class Eta:
    """Time to go, from measured tasks only: a task costs what it cost last time, else what its kind costs on average.

    Args:
        tasks: (kind, identity) of everything still to do; the same identity comes once a round.
    """

    def __init__(self, tasks: Iterable[tuple[str, Hashable]]) -> None:
        self._todo = list(tasks)
        self._last: dict[Hashable, float] = {}
        self._kinds: dict[str, list[float]] = defaultdict(list)

    def finished(self, kind: str, identity: Hashable, seconds: float) -> None:
        """Note a finished task."""
        self._todo.remove((kind, identity))
        self._last[identity] = seconds
        self._kinds[kind].append(seconds)

    def text(self, running: Running | None = None) -> str:
        """Time to go, `at least` that of the known tasks as long as a kind has never been measured, `?` where nothing is known."""
        seconds, unknown = self.seconds(running)
        if not unknown:
            return clock(seconds)
        return f"at least {clock(seconds)}" if seconds else "?"

    def seconds(self, running: Running | None = None) -> tuple[float, int]:
        """Time to go of the tasks whose cost is known, in seconds, and the number of the others; the task under way counts by its share."""
        todo, left, unknown = list(self._todo), 0.0, 0
        means = {kind: fmean(durations) for kind, durations in self._kinds.items()}
        if running is not None and running.share > 0:
            whole = running.seconds / running.share
            todo.remove((running.kind, running.identity))
            left = whole - running.seconds
            means.setdefault(running.kind, whole)
        for kind, identity in todo:
            known = self._last.get(identity, means.get(kind))
            if known is None:
                unknown += 1
            else:
                left += known
        return left, unknown


def clock(seconds: float) -> str:
    """`1:05` or `2:01:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """Shows the tasks of a run; never draws by itself, so that nothing runs beside a timed region.

    Args:
        tasks: (kind, identity) of each task to come.
        stream: where to; standard error by default, so that standard output holds results alone.
    """

    def __init__(self, tasks: Iterable[tuple[str, Hashable]], *, stream: TextIO | None = None) -> None:
        tasks = list(tasks)
        self.total, self.done = len(tasks), 0
        self._eta = Eta(tasks)
        self._stream = stream or sys.stderr
        self._display = _Bar(self.total, self._stream) if self._stream.isatty() else _Lines(self._stream)
        self._task: tuple[str, Hashable] | None = None
        self._label, self._started = "", 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._display.close()

    def start(self, kind: str, identity: Hashable, label: str) -> None:
        """A task begins."""
        self._task, self._label, self._started = (kind, identity), label, time.monotonic()
        self._display.show(self.done, self.total, label, self._eta.text(), force=self.done == 0)

    def update(self, share: float, text: str) -> None:
        """The task under way is done to a share of 0..1."""
        assert self._task is not None
        running = Running(*self._task, time.monotonic() - self._started, share)
        self._display.show(self.done, self.total, f"{self._label}: {text}", self._eta.text(running))

    def finish(self) -> None:
        """The task under way is done."""
        assert self._task is not None
        self._eta.finished(*self._task, time.monotonic() - self._started)
        self.done += 1
        self._display.show(self.done, self.total, self._label, self._eta.text(), force=self.done == self.total)

    def note(self, text: str) -> None:
        """A line that stays."""
        self._display.note(text)


class _Lines:
    """Plain lines, at most one every few seconds."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown = -PLAIN_SECONDS

    def show(self, done: int, total: int, label: str, eta: str, *, force: bool = False) -> None:
        now = time.monotonic()
        if force or now - self._shown >= PLAIN_SECONDS:
            self._shown = now
            self.note(f"[{done}/{total}] to go {eta} | {label}")

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing is left open."""


class _Bar:
    """A bar of rich, drawn when told to."""

    def __init__(self, total: int, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = Progress(
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("to go {task.fields[eta]}"),
            TextColumn("{task.description}"),
            console=Console(file=stream),
            auto_refresh=False,
            transient=True,
        )
        self._task = self._progress.add_task("", total=total, eta="?")
        self._progress.start()

    def show(self, done: int, total: int, label: str, eta: str, *, force: bool = False) -> None:
        self._progress.update(self._task, completed=done, description=label, eta=eta, refresh=True)

    def note(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self._progress.stop()
