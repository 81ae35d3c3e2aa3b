"""How far a run is: a bar with time to go on a terminal, plain lines elsewhere. Standard library and rich."""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import TracebackType
from typing import TextIO

PLAIN_SECONDS = 5.0
"""Least time between two plain lines within one task."""

DUMB = ("dumb", "unknown")
"""What TERM is where a terminal cannot draw, as rich has it."""


@dataclass(frozen=True)
class Running:
    """A task under way: its kind and identity, seconds so far, the share of 0..1 that is done, and the share that it began with."""

    kind: str
    identity: Hashable
    seconds: float
    share: float
    begun: float = 0.0


class Eta:
    """Time to go, from measured tasks only: a task costs what it cost last time, else what its kind costs on average.

    Args:
        tasks: (kind, identity) of everything still to do; the same identity comes once a round.
        at_once: how many tasks of a kind are done side by side, 1 by default.
    """

    def __init__(self, tasks: Iterable[tuple[str, Hashable]], at_once: Mapping[str, int] | None = None) -> None:
        self._todo = list(tasks)
        self._at_once = at_once or {}
        self._last: dict[Hashable, float] = {}
        self._kinds: dict[str, list[float]] = defaultdict(list)

    def finished(self, kind: str, identity: Hashable, seconds: float) -> None:
        """Note a finished task."""
        self._todo.remove((kind, identity))
        self._last[identity] = seconds
        self._kinds[kind].append(seconds)

    def text(self, running: Sequence[Running] = ()) -> str:
        """Time to go, `at least` that of the known tasks as long as a kind has never been measured, `?` where nothing is known."""
        seconds, unknown = self.seconds(running)
        if not unknown:
            return clock(seconds)
        return f"at least {clock(seconds)}" if seconds else "?"

    def seconds(self, running: Sequence[Running] = ()) -> tuple[float, int]:
        """Time to go of the tasks whose cost is known, in seconds, and the number of the others; those under way count by their share."""
        todo, unknown = list(self._todo), 0
        left: dict[str, list[float]] = defaultdict(list)
        durations = defaultdict(list, {kind: list(known) for kind, known in self._kinds.items()})
        for task in running:
            if task.share > task.begun:
                whole = task.seconds / (task.share - task.begun)
                todo.remove((task.kind, task.identity))
                left[task.kind].append(whole * (1 - task.share))
                if task.kind not in self._kinds:
                    durations[task.kind].append(whole)
        means = {kind: fmean(known) for kind, known in durations.items()}
        for kind, identity in todo:
            known = self._last.get(identity, means.get(kind))
            if known is None:
                unknown += 1
            else:
                left[kind].append(known)
        # side by side they take their share each, but no less than the longest of them
        return sum(max(sum(parts) / self._at_once.get(kind, 1), max(parts)) for kind, parts in left.items()), unknown


def clock(seconds: float) -> str:
    """`1:05` or `2:01:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@dataclass
class Shown:
    """A task under way as it is shown; one that goes on from a checkpoint begins with a share."""

    kind: str
    label: str
    started: float
    begun: float = 0.0
    share: float = 0.0
    text: str = ""

    def __str__(self) -> str:
        return f"{self.label}: {self.text}" if self.text else self.label


class Progress:
    """Shows the tasks of a run; never draws by itself, so that nothing runs beside a timed region.

    Args:
        tasks: (kind, identity) of each task to come.
        at_once: how many tasks of a kind are done side by side, 1 by default.
        stream: where to; standard error by default, so that standard output holds results alone.
    """

    def __init__(
        self, tasks: Iterable[tuple[str, Hashable]], *, at_once: Mapping[str, int] | None = None, stream: TextIO | None = None
    ) -> None:
        tasks = list(tasks)
        self.total, self.done = len(tasks), 0
        self._eta = Eta(tasks, at_once)
        self._stream = stream or sys.stderr
        draws = self._stream.isatty() and os.environ.get("TERM", "").lower() not in DUMB
        self._display = _Bar(self.total, self._stream) if draws else _Lines(self._stream)
        self._running: dict[Hashable, Shown] = {}

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._display.close()

    def start(self, kind: str, identity: Hashable, label: str) -> None:
        """A task begins."""
        shown = self._running[identity] = Shown(kind, label, time.monotonic())
        self._show(shown, force=self.done == 0 and len(self._running) == 1)

    def update(self, identity: Hashable, share: float, text: str) -> None:
        """A task under way is done to a share of 0..1."""
        shown = self._running[identity]
        if not shown.text and share < 1:
            shown.begun = share
        shown.share, shown.text = share, text
        self._show(shown)

    def finish(self, identity: Hashable) -> None:
        """A task under way is done."""
        shown = self._running.pop(identity)
        self._eta.finished(shown.kind, identity, (time.monotonic() - shown.started) / (1 - shown.begun))
        self.done += 1
        self._show(Shown(shown.kind, shown.label, shown.started), force=self.done == self.total)

    def note(self, text: str) -> None:
        """A line that stays."""
        self._display.note(text)

    def _show(self, latest: Shown, *, force: bool = False) -> None:
        now = time.monotonic()
        running = [
            Running(shown.kind, identity, now - shown.started, shown.share, shown.begun) for identity, shown in self._running.items()
        ]
        self._display.show(self.done, self.total, latest, list(self._running.values()), self._eta.text(running), force=force)


class _Lines:
    """Plain lines, at most one every few seconds."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown = -PLAIN_SECONDS

    def show(self, done: int, total: int, latest: Shown, running: Sequence[Shown], eta: str, *, force: bool = False) -> None:
        """The latest that was heard of in full, of several only their shares."""
        now = time.monotonic()
        if force or now - self._shown >= PLAIN_SECONDS:
            self._shown = now
            shares = " ".join(f"{shown.share:.0%}" for shown in running)
            several = f" | {len(running)} at once: {shares}" if len(running) > 1 else ""
            self.note(f"[{done}/{total}] to go {eta}{several} | {latest}")

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing is left open."""


class _Bar:
    """A bar of rich, drawn when told to; below it a line for each task under way."""

    def __init__(self, total: int, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskID, TextColumn

        self._progress = Progress(
            BarColumn(bar_width=30),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.description}", markup=False),
            console=Console(file=stream),
            auto_refresh=False,
            transient=True,
        )
        self._whole = self._progress.add_task("", total=total, count=f"0/{total}")
        self._rows: list[TaskID] = []
        self._progress.start()

    def show(self, done: int, total: int, latest: Shown, running: Sequence[Shown], eta: str, *, force: bool = False) -> None:
        """Everything, each time."""
        while len(self._rows) < len(running):
            self._rows.append(self._progress.add_task("", total=1.0, count=""))
        while len(self._rows) > len(running):
            self._progress.remove_task(self._rows.pop())
        for row, shown in zip(self._rows, running, strict=True):
            self._progress.update(row, completed=shown.share, description=str(shown), count=f"{shown.share:.0%}")
        self._progress.update(self._whole, completed=done, count=f"{done}/{total}", description=f"to go {eta}", refresh=True)

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._progress.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """The bar goes."""
        self._progress.stop()
