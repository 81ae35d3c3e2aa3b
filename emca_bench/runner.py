"""Carries out studies: plan, skip what is done, interleave rounds, measure in a worker process, append records."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from emca_bench.environment import default_threads
from emca_bench.errors import UsageError
from emca_bench.progress import Progress
from emca_bench.records import Record, RecordWriter, read_records, write_atomically
from emca_bench.specs import Cell, Study, canonical_json, dump_lock

RECORDS, LOCK, ENVIRONMENT, ARTIFACTS, WORKER_LOG = "records.jsonl", "study.lock.json", "environment.json", "artifacts", "worker.log"
TRAINED = ("mechanism", "accuracy")
"""Measures that train, after all that are timed."""
CHECKPOINTS = "checkpoints"
"""Folder of trainings under way, a file each; gone when their record is there."""


@dataclass(frozen=True)
class Task:
    """One record to be made."""

    study: Study
    cell: Cell
    measure: str
    round: int

    @property
    def key(self) -> str:
        """Identity of the cell and measure."""
        return self.cell.key(self.measure)


@dataclass
class Outcome:
    """What a run did."""

    folder: Path
    measured: int = 0
    skipped: int = 0
    failed: int = 0
    impossible: int = 0


def plan(studies: Sequence[Study]) -> list[Task]:
    """All tasks of the studies in the order in which they are measured: exact counts first, then memory, latency in rounds, accuracy."""
    tasks = []
    for measure in ("macs", "memory"):
        tasks += [Task(study, cell, measure, 0) for study in studies if measure in study.measures for cell in study.cells()]
    for study in studies:
        if "latency" in study.measures:
            order = random.Random(study.settings.seed)
            for number in range(study.settings.rounds):
                cells = study.cells()
                order.shuffle(cells)
                tasks += [Task(study, cell, "latency", number) for cell in cells]
    for measure in TRAINED:
        tasks += [Task(study, cell, measure, 0) for study in studies if measure in study.measures for cell in study.cells()]
    return tasks


def finished_slots(records: Sequence[Record]) -> set[tuple[str, str, int]]:
    """What needs no measuring again. `impossible` is tried again: what was missing may be there by now."""
    return {record.slot for record in records if record.status == "ok"}


def run(
    studies: Sequence[Study],
    folder: Path,
    *,
    whole: Sequence[Study] | None = None,
    threads: int | None = None,
    device: str = "cpu",
    command: str = "",
) -> Outcome:
    """Measure what the folder does not hold yet.

    Args:
        studies: what to measure now.
        folder: of the run; made if need be.
        whole: the studies that the folder is about, where `studies` are a part of them.
        threads: of torch; all cores by default.
        device: "cpu" or "cuda", overrides what studies say.
        command: for the record of how it was made.

    Returns:
        Counts of what was done. Whatever was measured before an interrupt or an error is in the folder.

    Raises:
        UsageError: bad input, found before anything is measured; an unwritable folder; no such device.
        KeyboardInterrupt: handed through, with all records on disk.
    """
    studies, whole = on_device(studies, device), on_device(whole or studies, device)
    _prepare(folder)
    outcome = Outcome(folder)
    with RecordWriter(folder / RECORDS) as writer, Worker(folder, threads=threads or default_threads(), device=device) as worker:
        records = read_records(folder / RECORDS)
        done = finished_slots(records)
        refused = {(record.slot, record.reason) for record in records if record.status == "impossible"}
        context = worker.environment["context"]
        tasks = plan(studies)
        todo = [task for task in tasks if (context, task.key, task.round) not in done]
        outcome.skipped = len(tasks) - len(todo)
        for task in _one_per_name(todo):
            worker.ask("check", task)
        write_atomically(folder / LOCK, dump_lock(whole))
        if todo or not (folder / ENVIRONMENT).exists():
            _note_environment(folder / ENVIRONMENT, worker.environment, command)
        with Progress([(task.measure, task.key) for task in todo]) as progress:
            for task in todo:
                progress.start(task.measure, task.key, f"{task.measure} {task.cell.label()}")
                record = _measure(worker, task, context, progress)
                # said once is enough
                if record.status != "impossible" or (record.slot, record.reason) not in refused:
                    writer.append(record)
                if record.status == "ok":
                    checkpoint_path(folder, task.key).unlink(missing_ok=True)
                progress.finish()
                outcome.measured += record.status == "ok"
                outcome.failed += record.status == "failed"
                outcome.impossible += record.status == "impossible"
                if record.status != "ok":
                    progress.note(f"{record.status}: {task.measure} {task.cell.label()}: {record.reason}")
    return outcome


def checkpoint_path(folder: Path, key: str) -> Path:
    """Where the training of a cell keeps its state."""
    return folder / CHECKPOINTS / f"{key}.pt"


def on_device(studies: Sequence[Study], device: str) -> list[Study]:
    """The studies with every cell on one device."""
    moved = []
    for study in studies:
        axes = {name: values for name, values in study.axes.items() if name != "device"}
        moved.append(replace(study, axes=axes, fixed={**study.fixed, "device": device}))
    return moved


def _measure(worker: Worker, task: Task, context: str, progress: Progress) -> Record:
    result = worker.ask(task.measure, task, progress)
    return Record(
        context=context,
        study=task.study.name,
        key=task.key,
        measure=task.measure,
        arm=task.cell.arm.name,
        params=dict(task.cell.params),
        round=task.round,
        status=result["status"],
        reason=result.get("reason"),
        values=result.get("values", {}),
        samples=result.get("samples", {}),
        duration_s=round(result.get("duration_s", 0.0), 3),
    )


def _one_per_name(tasks: Sequence[Task]) -> Iterator[Task]:
    """One task per combination of names, so that a wrong one is found before anything is measured."""
    seen = set()
    for task in tasks:
        params = task.cell.params
        chosen = [params.get(name) for name in ("model", "dataset", "scope", "op", "pass")]
        names = canonical_json([asdict(task.cell.arm), task.study.name, *chosen])
        if names not in seen:
            seen.add(names)
            yield task


def _prepare(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UsageError(f"output folder {folder} cannot be written: {error.strerror}; choose another with --out") from None


def _note_environment(path: Path, environment: Mapping[str, Any], command: str) -> None:
    """Add or renew this context's entry; the others stay, since their records stay."""
    known: dict[str, Any] = {"environments": {}}
    if path.exists():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"{path} is not JSON: {error}") from None
    context = environment["context"]
    known["current"] = context
    known["environments"][context] = {"identity": environment["identity"], "state": environment["state"], "command": command}
    write_atomically(path, json.dumps(known, indent=1, sort_keys=True) + "\n")


class Worker:
    """The measuring process; started anew after it died. Ctrl-C does not reach it, its parent decides.

    Args:
        folder: of the run; the worker's own output goes to a log there.
        threads, device: see `run`.
    """

    def __init__(self, folder: Path, *, threads: int, device: str) -> None:
        self._folder, self._threads, self._device = folder, threads, device
        self._process: subprocess.Popen[str] | None = None
        self._patient = False
        self.environment: dict[str, Any] = {}

    def __enter__(self) -> Worker:
        self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def ask(self, do: str, task: Task, progress: Progress | None = None) -> dict[str, Any]:
        """The result of a request; a worker that dies over it gives a failed result.

        Raises:
            UsageError: the request cannot be carried out as written.
        """
        patient = do in TRAINED
        if self._process is None or patient != self._patient:
            self._stop()
            self._start(patient=patient)
        assert self._process is not None
        assert self._process.stdin is not None
        request = {
            "do": do,
            "arm": asdict(task.cell.arm),
            "params": dict(task.cell.params),
            "settings": asdict(task.study.settings),
            "key": task.key,
            "artifacts": str(self._folder / ARTIFACTS),
            "checkpoint": str(checkpoint_path(self._folder, task.key)),
        }
        try:
            self._process.stdin.write(canonical_json(request) + "\n")
            self._process.stdin.flush()
            while True:
                message = self._read()
                if message["kind"] == "result":
                    return message
                if message["kind"] == "progress" and progress is not None:
                    progress.update(message["done"] / message["total"], message["text"])
        except (EOFError, BrokenPipeError):
            code = self._process.wait()
            self._stop()
            return {"status": "failed", "reason": f"the measuring process ended with code {code}; its last words are in {WORKER_LOG}"}

    def _start(self, *, patient: bool = False) -> None:
        """Start the process; a patient one lets idle threads sleep, which costs microseconds a step and saves a busy machine minutes."""
        self._patient = patient
        with (self._folder / WORKER_LOG).open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "emca_bench.measure.worker", str(self._threads), self._device],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"} if patient else None,
            )
        try:
            self.environment = self._read()
        except UsageError:
            self._stop()
            raise
        except EOFError:
            self._stop()
            raise UsageError(f"the measuring process did not start; its last words are in {self._folder / WORKER_LOG}") from None

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process = None

    def _read(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise EOFError
        message = json.loads(line)
        if message["kind"] == "usage":
            raise UsageError(message["message"])
        return message
