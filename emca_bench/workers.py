"""The processes that measure: one, or several side by side. Ctrl-C does not reach them, their parent decides."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from emca_bench.errors import UsageError
from emca_bench.specs import canonical_json

ALONE = ("memory", "latency")
"""Measures that need the machine to themselves: times, and memory, since libraries choose algorithms by what is free."""

TRAINED = ("mechanism", "accuracy")
"""Measures that train, in a patient process."""

PATIENT = {"OMP_WAIT_POLICY": "PASSIVE", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
"""Environment of a patient process: no latency is taken there, and no number that is learned changes.

Idle threads sleep, which costs microseconds a step and saves a busy machine minutes. Freed memory is kept: on Linux, pages that are new in
every step cost a fifth of it."""

Message = dict[str, Any]
"""What a process answers, see `measure.worker`: its "kind" is "progress" or "result", and "started" where several work."""


class Worker:
    """A measuring process, started when there is a request, and anew after it died.

    Args:
        log: file for what the process itself prints.
        threads, device: of torch in the process.

    Attributes:
        environment: what the process was started on, from its first answer on.
        identity: of the first environment; a process that finds another one is not used.
    """

    def __init__(self, log: Path, *, threads: int, device: str) -> None:
        self._log = log
        self._command = [sys.executable, "-m", "emca_bench.measure.worker", str(threads), device]
        self._process: subprocess.Popen[bytes] | None = None
        self._patient = False
        self._unread = b""
        self.environment: dict[str, Any] = {}
        self.identity: dict[str, Any] = {}

    def start(self, *, patient: bool) -> dict[str, Any]:
        """Start the process and wait for its environment.

        Args:
            patient: whether it trains, see `PATIENT`.

        Raises:
            UsageError: it does not start, or has no such device.
        """
        self._start(patient=patient)
        while not self.environment:
            self.receive()
        return self.environment

    def ask(self, request: Mapping[str, Any]) -> Message:
        """The result of a request, which is a failed one if the process dies over it.

        Raises:
            UsageError: the request cannot be carried out as written.
        """
        self.send(request)
        while True:
            for message in self.receive():
                if message["kind"] == "result":
                    return message

    def send(self, request: Mapping[str, Any]) -> None:
        """Hand over a request; one at a time."""
        do = request["do"]
        if self._process is None or (do in ALONE and self._patient) or (do in TRAINED and not self._patient):
            self.stop()
            self._start(patient=do not in ALONE)
        # of a process that is gone, the next read tells
        with contextlib.suppress(BrokenPipeError):
            pipe = self._pipe("stdin")
            pipe.write(canonical_json(request).encode() + b"\n")
            pipe.flush()

    def receive(self) -> list[Message]:
        """The messages that have come; waits for something to read, which need not be a whole message.

        Raises:
            UsageError: the process does not start, finds other source or versions than the one before, or cannot carry out its request.
        """
        found = os.read(self.fileno(), 2**16)
        if not found:
            return [self._ended()]
        *lines, self._unread = (self._unread + found).split(b"\n")
        messages = []
        for message in map(json.loads, lines):
            if message["kind"] == "usage":
                raise UsageError(message["message"])
            if message["kind"] == "ready":
                self.identity = self.identity or message["identity"]
                _check_same(self.identity, message["identity"])
                self.environment = message
            else:
                messages.append(message)
        return messages

    def fileno(self) -> int:
        """Of what the process answers on, to wait for."""
        return self._pipe("stdout").fileno()

    def stop(self) -> None:
        """Kill the process, whatever it does."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for name in ("stdin", "stdout"):
            with contextlib.suppress(BrokenPipeError):
                self._pipe(name).close()
        self._process, self._unread = None, b""

    def _start(self, *, patient: bool) -> None:
        self._patient, self.environment = patient, {}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **PATIENT} if patient else None,
            )

    def _pipe(self, name: str) -> IO[bytes]:
        assert self._process is not None, "a process is started by its first request"
        pipe: IO[bytes] = getattr(self._process, name)
        return pipe

    def _ended(self) -> Message:
        assert self._process is not None
        code = self._process.wait()
        self.stop()
        if not self.environment:
            raise UsageError(f"the measuring process did not start; its last words are in {self._log}")
        reason = f"the measuring process ended with code {code}; its last words are in {self._log.name}"
        return {"kind": "result", "status": "failed", "reason": reason}


class Workers:
    """Measuring processes of one run.

    Args:
        count: how many there are at most.
        log, threads, device: of each, see `Worker`.
    """

    def __init__(self, count: int, log: Path, *, threads: int, device: str) -> None:
        self._workers = [Worker(log, threads=threads, device=device) for _ in range(count)]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for worker in self._workers:
            worker.stop()

    def start(self, *, patient: bool) -> dict[str, Any]:
        """Start the first process and wait for its environment, which that of all others must equal; see `Worker.start`."""
        environment = self.first.start(patient=patient)
        for worker in self._workers:
            worker.identity = environment["identity"]
        return environment

    @property
    def first(self) -> Worker:
        """The one that works alone where only one does."""
        return self._workers[0]

    def answers(self, requests: Sequence[Mapping[str, Any]], *, at_once: int) -> Iterator[tuple[int, Message]]:
        """Carry out requests, some at a time; the others of the processes are stopped.

        Yields:
            Number of the request and a message about it, as they come: "started", any "progress", one "result".

        Raises:
            UsageError: a request cannot be carried out as written.
        """
        idle, resting = self._workers[:at_once], self._workers[at_once:]
        for worker in resting:
            worker.stop()
        todo, busy = iter(enumerate(requests)), dict[Worker, int]()
        while True:
            while idle and (following := next(todo, None)) is not None:
                number, request = following
                worker = idle.pop(0)
                worker.send(request)
                busy[worker] = number
                yield number, {"kind": "started"}
            if not busy:
                return
            heard: list[Any] = wait(list[Any](busy))
            wrong = None
            for worker in heard:
                try:
                    messages = worker.receive()
                except UsageError as error:
                    # the results of the others that were heard come first
                    wrong = wrong or error
                    continue
                for message in messages:
                    number = busy[worker]
                    if message["kind"] == "result":
                        del busy[worker]
                        idle.append(worker)
                    yield number, message
            if wrong is not None:
                raise wrong


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [f"{name} was {before.get(name)} and is {now.get(name)}" for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        raise UsageError(
            f"the run's conditions changed under it: {'; '.join(changed)}. What was measured before is kept; run again for the rest"
        )
