"""Verbs that measure and train: run, train, feed."""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emca_bench.cli.common import FAILED, INTERRUPTED, OK, at_least_one, load, trainings
from emca_bench.cli.reports import render_report
from emca_bench.errors import UsageError

if TYPE_CHECKING:
    from emca_bench.progress import Progress


def run(arguments: argparse.Namespace, argv: list[str]) -> int:
    """`emca-bench run`."""
    from emca_bench import runner
    from emca_bench.workers import ALONE

    at_least_one("--threads", arguments.threads)
    at_least_one("--jobs", arguments.jobs)
    part, whole, folder = load(arguments)
    command = shlex.join(["emca-bench", *argv])
    timed = any(measure in ALONE for study in part for measure in study.measures)
    if arguments.jobs > 1 and arguments.threads is None and timed:
        threads = runner.threads_of_each(arguments.jobs)
        print(f"{' and '.join(ALONE)} come alone, with threads = {threads} as all else here; --threads sets another", file=sys.stderr)
    # a polite kill (timeout, a batch system) leaves as Ctrl-C does: the measuring process stopped, the way to resume said
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        outcome = runner.run(
            part,
            folder,
            whole=whole,
            threads=arguments.threads,
            device=arguments.device,
            jobs=arguments.jobs,
            command=_portable(arguments),
        )
        print(
            f"measured {outcome.measured}, already there {outcome.skipped}, impossible {outcome.impossible}, failed {outcome.failed}",
            file=sys.stderr,
        )
        render_report(folder, folder)
    except KeyboardInterrupt:
        print(f"\ninterrupted; every finished measurement is in {folder}. To resume: {command}", file=sys.stderr)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    return FAILED if outcome.failed else OK


def train(arguments: argparse.Namespace, argv: list[str]) -> int:
    """`emca-bench train`."""
    from emca_bench.measure.training import train_cell
    from emca_bench.progress import Progress
    from emca_bench.records import RecordWriter
    from emca_bench.runner import RECORDS, checkpoint_path, prepare
    from emca_bench.train import Processes

    part, _, folder = load(arguments)
    cells, device = trainings(arguments, part)
    scored = _scored(folder, device)
    cells = [cell for cell in cells if cell.key("accuracy") not in scored]
    processes = Processes(device)
    prepare(folder)
    # as run does, which writes the same checkpoints
    lock = RecordWriter(folder / RECORDS) if processes.first else contextlib.nullcontext()
    with lock, Progress([("train", cell.key("accuracy")) for cell in cells], stream=None if processes.first else io.StringIO()) as progress:
        for cell in cells:
            key, steps = cell.key("accuracy"), int(cell.params["steps"])
            progress.start("train", key, f"train {cell.label()}")
            train_cell(
                cell.arm,
                cell.params,
                checkpoint=checkpoint_path(folder, key),
                tensorboard=arguments.tensorboard and arguments.tensorboard / f"{cell.arm.name}-{cell.params['seed']}-{key}",
                processes=processes,
                on_step=partial(_show_step, progress, key, steps),
            )
            progress.finish(key)
    if processes.first:
        count = f"{len(cells)} cell{'' if len(cells) == 1 else 's'}"
        print(f"trained: {count} in {folder}. To score: {shlex.join(['emca-bench', 'run', *_same_run(argv)])}")
    processes.end()
    return OK


def feed(arguments: argparse.Namespace, argv: list[str]) -> int:
    """`emca-bench feed`: of each data set, the first cell of the study."""
    from emca_bench.measure.feeding import TOLERATED, describe, measure_feeding

    counts = _counts(arguments.processes)
    part, _, _ = load(arguments)
    first = {cell.params["dataset"]: cell for cell in reversed(trainings(arguments, part)[0])}
    starved = False
    for cell in reversed(first.values()):
        own = int(cell.params.get("loader_workers", 0))
        feeding = measure_feeding(
            cell.arm,
            cell.params,
            processes=sorted({own, *counts}),
            seconds=arguments.seconds,
            on_loader=lambda count: print(f"{count} loader processes ...", file=sys.stderr),
        )
        print("\n".join(describe(feeding, cell.label(), own=own)))
        starved |= feeding.waiting(own) > TOLERATED
    return FAILED if starved else OK


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [-1]
    if min(counts) < 0:
        raise UsageError(f"--processes {text!r}: expected numbers, 0 for none, separated by commas, for example 1,2,4,8")
    return counts


def _scored(folder: Path, device: str) -> set[str]:
    """Keys of the cells whose record is there, from this machine and source, with any number of threads."""
    from emca_bench.environment import collect_environment, default_threads
    from emca_bench.records import read_records
    from emca_bench.runner import ENVIRONMENT, RECORDS, finished_slots, known_environments

    def but_threads(environment: Mapping[str, Any]) -> dict[str, Any]:
        return {**environment["identity"], "threads": None}

    here = but_threads(collect_environment(threads=default_threads(), device=device))
    alike = {context for context, entry in known_environments(folder / ENVIRONMENT).items() if but_threads(entry) == here}
    return {key for context, key, _ in finished_slots(read_records(folder / RECORDS)) if context in alike}


def _show_step(progress: Progress, key: str, steps: int, step: int, loss: float) -> None:
    progress.update(key, step / steps, f"step {step}/{steps}, loss {loss:.2f}")


def _same_run(argv: Sequence[str]) -> list[str]:
    """The arguments of `train` that `run` takes too."""
    words = list(argv[1:])
    for index, word in enumerate(words):
        if word == "--tensorboard":
            return words[:index] + words[index + 2 :]
    return [word for word in words if not word.startswith("--tensorboard=")]


def _portable(arguments: argparse.Namespace) -> str:
    """The command for the record: without paths of this machine."""
    words = ["emca-bench", "run", Path(arguments.study).stem, *(["--quick"] if arguments.quick else [])]
    words += [word for condition in arguments.only for word in ("--only", condition)]
    if arguments.threads:
        words += ["--threads", str(arguments.threads)]
    if arguments.jobs > 1:
        words += ["--jobs", str(arguments.jobs)]
    if arguments.device:
        words += ["--device", arguments.device]
    return shlex.join(words)
