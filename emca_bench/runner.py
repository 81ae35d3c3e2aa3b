"""Carries out studies: plan, skip what is done, interleave rounds, measure in a worker process, append records."""

from __future__ import annotations

import itertools
import json
import random
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from emca_bench.environment import default_threads
from emca_bench.errors import UsageError, listing
from emca_bench.progress import Progress
from emca_bench.records import Record, RecordWriter, Status, commands_of, read_records, write_atomically
from emca_bench.specs import MEASURES, Cell, Study, canonical_json, dump_lock
from emca_bench.workers import ALONE, TRAINED, Message, Workers

RECORDS, LOCK, ENVIRONMENT, ARTIFACTS, WORKER_LOG = "records.jsonl", "study.lock.json", "environment.json", "artifacts", "worker.log"
CHECKPOINTS = "checkpoints"
"""Folder of trainings under way, a file each; gone when their record is there."""
OUT_OF_MEMORY = ("OutOfMemoryError", "ended with code -9")
"""What the reason of a failed cell says where memory ran out; the second is how Linux ends a process then."""


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


class Origin(NamedTuple):
    """Where records come from: what they were measured on, and the call of `run` whose rounds are interleaved."""

    context: str
    session: str


@dataclass
class Outcome:
    """What a run did."""

    folder: Path
    measured: int = 0
    skipped: int = 0
    failed: int = 0
    impossible: int = 0

    def count(self, status: Status) -> None:
        """Note a record."""
        self.measured += status == "ok"
        self.failed += status == "failed"
        self.impossible += status == "impossible"


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


def measured_elsewhere(todo: Sequence[Task], done: set[tuple[str, str, int]]) -> int:
    """How many of the tasks have a record, but not one of this context."""
    known = {slot[1:] for slot in done}
    return sum((task.key, task.round) in known for task in todo)


def run(
    studies: Sequence[Study],
    folder: Path,
    *,
    whole: Sequence[Study] | None = None,
    threads: int | None = None,
    device: str | None = None,
    jobs: int = 1,
    command: str = "",
) -> Outcome:
    """Measure what the folder does not hold yet.

    Args:
        studies: what to measure now.
        folder: of the run; made if need be.
        whole: the studies that the folder is about, where `studies` are a part of them.
        threads: of torch in each process; by default the cores, shared by the jobs.
        device: "cpu" or "cuda", by default what the studies name; one GPU serves all jobs.
        jobs: cells measured side by side, each in a process of its own; those of `ALONE` still come one by one.
        command: for the record of how it was made.

    Returns:
        Counts of what was done. Whatever was measured before an interrupt or an error is in the folder.

    Raises:
        UsageError: bad input, found before anything is measured; an unwritable folder; no such device.
        KeyboardInterrupt: handed through, with all records on disk.
    """
    device = device or device_of(studies)
    studies, whole = on_device(studies, device), on_device(whole or studies, device)
    threads = threads or threads_of_each(jobs)
    prepare(folder)
    outcome = Outcome(folder)
    with RecordWriter(folder / RECORDS) as writer, Workers(jobs, folder / WORKER_LOG, threads=threads, device=device) as workers:
        tasks = plan(studies)
        environment = workers.start(patient=not any(task.measure in ALONE for task in tasks))
        records = read_records(folder / RECORDS)
        done = finished_slots(records)
        refused = {(record.slot, record.reason) for record in records if record.status == "impossible"}
        todo = [task for task in tasks if (environment["context"], task.key, task.round) not in done]
        outcome.skipped = len(tasks) - len(todo)
        for task in _one_per_name(todo):
            workers.first.ask(_request(task, folder, do="check"))
        write_atomically(folder / LOCK, dump_lock(whole))
        _note_environment(folder / ENVIRONMENT, environment, command, measured=False)
        _tidy_checkpoints(folder, {task.key for task in tasks} - {task.key for task in todo})
        at_once = {measure: 1 if measure in ALONE else jobs for measure in MEASURES}
        with Progress([(task.measure, task.key) for task in todo], at_once=at_once) as progress:
            if elsewhere := measured_elsewhere(todo, done):
                progress.note(f"{elsewhere} of {len(todo)} are there from another machine, version or number of threads, and come anew")
            appended = False
            origin = Origin(environment["context"], secrets.token_hex(4))
            for record in _records(workers, todo, outcome, origin, at_once, progress):
                # said once is enough
                if record.status != "impossible" or (record.slot, record.reason) not in refused:
                    if not appended:
                        _note_environment(folder / ENVIRONMENT, environment, command, measured=True)
                    writer.append(record)
                    appended = True
                if record.status == "ok":
                    checkpoint_path(folder, record.key).unlink(missing_ok=True)
    return outcome


def _tidy_checkpoints(folder: Path, finished: Iterable[str]) -> None:
    """Remove what a kill left: halves of files, and states of trainings whose record was written just before."""
    for path in [*(folder / CHECKPOINTS).glob("*.partial"), *(checkpoint_path(folder, key) for key in finished)]:
        path.unlink(missing_ok=True)


def threads_of_each(jobs: int) -> int:
    """Threads of torch in each of the processes, where nothing else is asked for."""
    return max(1, default_threads() // jobs)


def checkpoint_path(folder: Path, key: str) -> Path:
    """Where the training of a cell keeps its state."""
    return folder / CHECKPOINTS / f"{key}.pt"


def device_of(studies: Sequence[Study]) -> str:
    """The device that studies name, "cpu" where they name none.

    Raises:
        UsageError: they name several.
    """
    named = {str(cell.params["device"]) for study in studies for cell in study.cells() if "device" in cell.params}
    if len(named) > 1:
        raise UsageError(f"the studies name the devices {listing(sorted(named))}; a run has one: choose it with --device")
    return named.pop() if named else "cpu"


def on_device(studies: Sequence[Study], device: str) -> list[Study]:
    """The studies with every cell on one device."""
    moved = []
    for study in studies:
        axes = {name: values for name, values in study.axes.items() if name != "device"}
        moved.append(replace(study, axes=axes, fixed={**study.fixed, "device": device}))
    return moved


def _records(
    workers: Workers, tasks: Sequence[Task], outcome: Outcome, origin: Origin, at_once: Mapping[str, int], progress: Progress
) -> Iterator[Record]:
    """The record of each task as it comes in; those that share the machine side by side, shown and counted as they go."""
    for number, group in itertools.groupby(tasks, key=lambda task: at_once[task.measure]):
        together = list(group)
        for index, message in workers.answers([_request(task, outcome.folder) for task in together], at_once=number):
            task = together[index]
            if message["kind"] == "started":
                progress.start(task.measure, task.key, f"{task.measure} {task.cell.label()}")
            elif message["kind"] == "progress":
                progress.update(task.key, message["done"] / message["total"], message["text"])
            else:
                record = _record(task, message, origin, number)
                yield record
                progress.finish(task.key)
                outcome.count(record.status)
                if record.status != "ok":
                    progress.note(f"{record.status}: {task.measure} {task.cell.label()}: {record.reason}")


def _request(task: Task, folder: Path, *, do: str = "") -> dict[str, Any]:
    return {
        "do": do or task.measure,
        "arm": asdict(task.cell.arm),
        "params": dict(task.cell.params),
        "settings": asdict(task.study.settings),
        "key": task.key,
        "artifacts": str(folder / ARTIFACTS),
        "checkpoint": str(checkpoint_path(folder, task.key)),
    }


def _record(task: Task, result: Message, origin: Origin, at_once: int) -> Record:
    values, reason = dict(result.get("values", {})), result.get("reason")
    if task.measure in TRAINED and result["status"] == "ok":
        # what it took is the time of a machine that they shared
        values["cells_at_once"] = at_once
    if result["status"] == "failed" and at_once > 1 and any(word in str(reason) for word in OUT_OF_MEMORY):
        reason = f"{reason}; or fewer cells at once than --jobs {at_once}"
    return Record(
        context=origin.context,
        session=origin.session,
        study=task.study.name,
        key=task.key,
        measure=task.measure,
        arm=task.cell.arm.name,
        params=dict(task.cell.params),
        round=task.round,
        status=result["status"],
        reason=reason,
        values=values,
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


def prepare(folder: Path) -> None:
    """Make a run folder.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # a file without a name: processes of one training try at the same time
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
    except OSError as error:
        raise UsageError(f"output folder {folder} cannot be written: {error.strerror}; choose another with --out") from None


def known_environments(path: Path) -> dict[str, Any]:
    """Contexts that a run folder has records of, by name.

    Raises:
        UsageError: the file is damaged.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["environments"]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged: {error!r}; expected JSON with 'environments'") from None
    return found


def _note_environment(path: Path, environment: Mapping[str, Any], command: str, *, measured: bool) -> None:
    """Make this context the current one; its state and commands are those of calls that measured something."""
    known, context = known_environments(path), environment["context"]
    entry = known.get(context)
    if measured or entry is None:
        commands = dict.fromkeys([*(commands_of(entry) if entry else ()), command])
        entry = {"identity": environment["identity"], "state": environment["state"], "commands": list(commands)}
    content = {"current": context, "environments": {**known, context: entry}}
    write_atomically(path, json.dumps(content, indent=1, sort_keys=True) + "\n")
