"""Verbs that look at studies and measure nothing: ls, validate, plan."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from emca_bench.cli.common import OK, at_least_one, load
from emca_bench.errors import UsageError, did_you_mean, listing

if TYPE_CHECKING:
    from emca_bench.specs import Study


def _list_studies() -> list[tuple[str, str]]:
    from emca_bench.specs import load_studies, study_folders

    paths = {path.stem: path for folder in reversed(study_folders()) for path in folder.glob("*.toml")}
    rows = []
    for name, path in sorted(paths.items()):
        studies = load_studies(path)
        one = all(study.name.startswith(studies[0].name) for study in studies)
        rows.append((name, studies[0].question if one else "all of " + ", ".join(study.name for study in studies)))
    return rows


def _list_attentions() -> list[tuple[str, str]]:
    from emca_bench.models import ATTENTIONS

    return [(name, _first_line(ATTENTIONS[name])) for name in ATTENTIONS]


def _list_models() -> list[tuple[str, str]]:
    from emca_bench.models import MODELS

    return [(name, MODELS[name].about) for name in MODELS]


def _list_datasets() -> list[tuple[str, str]]:
    from emca_bench.data import DATASETS

    return [(name, _first_line(DATASETS[name])) for name in DATASETS]


def _list_parameters() -> list[tuple[str, str]]:
    from emca_bench.specs import PARAMETERS

    return [(name, f"{kind.__name__}: {meaning}") for name, (kind, meaning) in PARAMETERS.items()]


LISTINGS: dict[str, Callable[[], list[tuple[str, str]]]] = {
    "studies": _list_studies,
    "attentions": _list_attentions,
    "models": _list_models,
    "datasets": _list_datasets,
    "parameters": _list_parameters,
}


def _first_line(target: object) -> str:
    return (target.__doc__ or "").strip().split("\n")[0]


def list_names(arguments: argparse.Namespace, argv: list[str]) -> int:
    """`emca-bench ls`."""
    for what, entries in LISTINGS.items():
        if arguments.what in ("all", what):
            print(f"{what}:")
            for name, text in entries():
                print(f"  {name:22} {text}")
    return OK


def validate(arguments: argparse.Namespace, argv: list[str]) -> int:
    """`emca-bench validate`."""
    from emca_bench.specs import find_study, load_studies

    for name in arguments.study:
        path = find_study(name)
        for quick in (False, True):
            for study in load_studies(path, quick=quick):
                _check_names(study)
                print(f"{path}: {study.name}{' (quick)' if study.quick else ''}: {len(study.cells())} cells, {', '.join(study.measures)}")
    return OK


def _check_names(study: Study) -> None:
    from emca_bench.data import DATASETS
    from emca_bench.measure.subjects import check_arm

    checked = set()
    for cell in study.cells():
        names = (cell.arm.name, *(cell.params.get(name) for name in ("model", "scope", "op", "pass")))
        if names not in checked:
            checked.add(names)
            check_arm(cell.arm, cell.params)
        if "dataset" in cell.params and cell.params["dataset"] not in DATASETS:
            name = str(cell.params["dataset"])
            raise UsageError(f"unknown dataset {name!r}{did_you_mean(name, DATASETS)}; known: {listing(DATASETS)}")


def plan(arguments: argparse.Namespace, argv: list[str]) -> int:
    """`emca-bench plan`."""
    from emca_bench.environment import collect_environment, default_threads
    from emca_bench.progress import clock
    from emca_bench.records import read_records
    from emca_bench.runner import RECORDS, device_of, finished_slots, on_device
    from emca_bench.runner import plan as plan_tasks

    at_least_one("--threads", arguments.threads)
    part, _, folder = load(arguments)
    device = arguments.device or device_of(part)
    records = read_records(folder / RECORDS)
    # without records nothing is done under any conditions, and torch stays out
    context = collect_environment(threads=arguments.threads or default_threads(), device=device)["context"] if records else ""
    done = finished_slots(records)
    seconds = {record.key: record.duration_s for record in records}
    tasks = plan_tasks(on_device(part, device))
    todo = [task for task in tasks if (context, task.key, task.round) not in done]
    known = [seconds[task.key] for task in todo if task.key in seconds]
    for cell, measure in dict.fromkeys((task.cell.label(), task.measure) for task in tasks):
        print(f"{measure:9} {cell}")
    estimate = (
        clock(sum(known)) if len(known) == len(todo) else f"at least {clock(sum(known))}" if known else "unknown before the first run"
    )
    print(f"{len(tasks)} measurements, {len(tasks) - len(todo)} done in {folder}, {len(todo)} to do; time: {estimate}")
    return OK
