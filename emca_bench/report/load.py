"""A run folder in memory: what was planned, what was measured, and under which conditions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from emca_bench import stats
from emca_bench.errors import UsageError
from emca_bench.records import Record, commands_of, read_records
from emca_bench.specs import Cell, Study, Value, load_lock

ResultStatus = Literal["ok", "partial", "failed", "impossible", "not run"]
Moment = tuple[str, int]
"""A round of a session: latencies are paired within one."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Machine and source of a run."""

    identity: Mapping[str, Any]
    """What must not differ within a report: processor, threads, versions."""
    state: Mapping[str, Any]
    """What may: commit, load, start time."""
    commands: Sequence[str]
    """What measured it, in order."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Everything recorded for one planned cell and measure."""

    cell: Cell
    measure: str
    planned_rounds: int
    done: Mapping[int, Record]
    """Successful records by round."""
    troubled: Mapping[int, Record]
    """Failed and impossible records of rounds without a successful one."""

    @property
    def status(self) -> ResultStatus:
        """`partial` is a cell that lacks some of its rounds."""
        if len(self.done) >= self.planned_rounds:
            return "ok"
        if self.done:
            return "partial"
        kinds = {record.status for record in self.troubled.values()}
        if not kinds:
            return "not run"
        return "failed" if "failed" in kinds else "impossible"

    @property
    def reason(self) -> str:
        """Why it is not `ok`, on one line; empty where nothing was recorded."""
        reasons = {" ".join((record.reason or "no reason recorded").split()): None for record in self.troubled.values()}
        return "; ".join(reasons)

    @property
    def values(self) -> Mapping[str, Any]:
        """Scalars of the first successful round."""
        return next(iter(self.done.values())).values if self.done else {}

    @property
    def latency_ms(self) -> dict[Moment, float]:
        """Median latency of one call in milliseconds, by session and round."""
        return stats.round_medians({(record.session, index): record.samples.get("latency_ms", []) for index, record in self.done.items()})


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder: plan, results of the current context, conditions."""

    folder: Path
    context: str
    environment: Environment
    studies: tuple[Study, ...]
    results: Mapping[str, Result]
    """By `cell.key(measure)`, in the order of the plan."""
    unused_records: int
    """Records of other contexts, or of cells that are not planned any more."""

    @property
    def quick(self) -> bool:
        """Whether any study ran in its shortened form."""
        return any(study.quick for study in self.studies)

    def find(self, cell: Cell, measure: str) -> Result | None:
        """The result of a planned cell, or None where the study does not take this measure."""
        return self.results.get(cell.key(measure))

    def planned(self, measure: str, scopes: Iterable[str] | None = None) -> list[tuple[Study, list[Cell]]]:
        """Studies that take this measure within these scopes (None: any), each with those of its cells."""
        wanted = None if scopes is None else set(scopes)
        found = []
        for study in self.studies:
            if measure in study.measures:
                cells = [cell for cell in distinct_cells(study) if wanted is None or cell.params["scope"] in wanted]
                if cells:
                    found.append((study, cells))
        return found

    def scheduler_tick(self, study: Study) -> float | None:
        """Period in ms that the latencies of a study are multiples of, which makes them worthless; None where they are not."""
        found = [self.find(cell, "latency") for cell in distinct_cells(study)]
        samples = [record.samples.get("latency_ms", []) for result in found if result for record in result.done.values()]
        return stats.scheduler_tick([sample for values in samples for sample in values])

    def count(self, *statuses: ResultStatus) -> int:
        """Number of planned cells and measures in these states, or of all of them."""
        return sum(not statuses or result.status in statuses for result in self.results.values())


def distinct_cells(study: Study) -> list[Cell]:
    """The cells of a study, each once: an arm that overrides an axis repeats itself along that axis."""
    cells = {cell.key(study.measures[0]): cell for cell in study.cells()} if study.measures else {}
    return list(cells.values())


def data_versions(results: Iterable[Result]) -> set[tuple[str, str]]:
    """Fingerprints of the training and the test images of finished accuracies: one pair, unless files changed between cells."""
    values = [result.values for result in results if result.done]
    return {(str(found.get("train_data", "")), str(found.get("data", ""))) for found in values}


def point(study: Study, cell: Cell, *, without: Iterable[str] = ()) -> tuple[tuple[str, Value], ...]:
    """Where on the axes a cell stands; rivals of one comparison share it."""
    left_out = set(without)
    return tuple((name, cell.params[name]) for name in study.axes if name not in left_out)


def load_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UsageError: not a run folder, or one that is damaged: the message names the file.
    """
    studies = tuple(_load_studies(folder / "study.lock.json"))
    context, environment = _load_environment(folder / "environment.json")
    records = read_records(folder / "records.jsonl")
    by_key: dict[str, list[Record]] = {}
    for record in records:
        if record.context == context:
            by_key.setdefault(record.key, []).append(record)
    results = {}
    for study in studies:
        for cell in distinct_cells(study):
            for measure in study.measures:
                key = cell.key(measure)
                results[key] = _result(study, cell, measure, by_key.get(key, []))
    used = sum(len(found) for key, found in by_key.items() if key in results)
    return Run(
        folder=folder, context=context, environment=environment, studies=studies, results=results, unused_records=len(records) - used
    )


def _load_studies(path: Path) -> list[Study]:
    try:
        return load_lock(path)
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is no study lock: {error!r}; the file was edited or damaged") from None


def _load_environment(path: Path) -> tuple[str, Environment]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        current = data["current"]
        entry = data["environments"][current]
        environment = Environment(identity=entry["identity"], state=entry.get("state", {}), commands=commands_of(entry))
    except OSError:
        raise UsageError(f"{path.parent} is no run folder: {path.name} is not there") from None
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} lacks {error}; expected 'current' and that context in 'environments'") from None
    return str(current), environment


def _result(study: Study, cell: Cell, measure: str, records: list[Record]) -> Result:
    done: dict[int, Record] = {}
    troubled: dict[int, Record] = {}
    for record in records:
        if record.status == "ok":
            done[record.round] = record
        else:
            troubled[record.round] = record
    return Result(
        cell=cell,
        measure=measure,
        planned_rounds=study.settings.rounds if measure == "latency" else 1,
        done=dict(sorted(done.items())),
        troubled={index: record for index, record in sorted(troubled.items()) if index not in done},
    )
