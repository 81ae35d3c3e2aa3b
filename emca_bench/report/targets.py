"""The project's own targets beside what was measured: met, missed, or left open, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from emca_bench import stats
from emca_bench.report import numbers
from emca_bench.report.load import Moment, Result, Run, distinct_cells
from emca_bench.specs import TIMED_MODEL_SCOPES, Cell, Study, Target
from emca_bench.stats import MIN_ROUNDS, Mean, Ratio

TargetVerdict = Literal["met", "missed", "undecided", "not run"]

ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
SHOWN = ("op", "pixels", "image_size", "pass", "queries", "width", "batch", "dtype", "device")
"""Conditions of a row, in the words of `numbers.conditions`."""
COUNTED = ("extra_memory", "memory_share")
"""Metrics of allocations, which are counted and have no interval."""
UNITS: dict[str, Callable[[float], str]] = {
    "speedup": lambda value: f"{value:g}{numbers.TIMES}",
    "rate_share": lambda value: f"{100 * value:g} %",
    "memory_share": lambda value: f"{100 * value:g} %",
    "traffic_share": lambda value: f"{100 * value:g} %",
    "overhead_us": lambda value: f"{numbers.significant(value)} \N{MICRO SIGN}s",
    "extra_memory": lambda value: f"{numbers.significant(value)} Q{numbers.TIMES}C",
}
"""A number of each metric with its unit."""
WORK = {"rate_share": "flops", "traffic_share": "bytes"}
"""What a metric divides by time, on both sides."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One target against one rival under one set of conditions."""

    target: Target
    study: Study
    against: str | None
    measured: str
    """With its interval; empty where nothing was measured."""
    found: Mean | Ratio | None
    conditions: str
    verdict: TargetVerdict
    reason: str

    @property
    def asked(self) -> str:
        """The bound, for example `≥ 3.5×`."""
        least, most = self.target.at_least, self.target.at_most
        sign = "\N{GREATER-THAN OR EQUAL TO}" if least is not None else "\N{LESS-THAN OR EQUAL TO}"
        return f"{sign} {UNITS[self.target.metric](least if least is not None else most or 0.0)}"


def targets(run: Run) -> list[Judged]:
    """Every `[[target]]` of the run's studies, once per rival and matching point of the axes."""
    return [
        row
        for study in run.studies
        for target in study.targets
        for against in target.against or (None,)
        for row in _rows(run, study, target, against)
    ]


def _rows(run: Run, study: Study, target: Target, against: str | None) -> Iterator[Judged]:
    measure = "memory" if target.metric in COUNTED else "latency"
    cells = distinct_cells(study)
    mine = [cell for cell in cells if cell.arm.name == target.arm and _matches(cell, target)]
    if measure not in study.measures or not mine:
        where = numbers.conditions(target.where)
        why = f"the run takes no {measure}" if measure not in study.measures else f"the run plans no {target.arm} at {where or 'all'}"
        yield _judged(study, target, against, where, None, "not run", f"{why}.")
        return
    for cell in mine:
        rivals = [other for other in cells if other.arm.name == against and _same_point(study, cell, other)]
        ours, theirs = run.find(cell, measure), run.find(rivals[0], measure) if rivals else None
        assert ours is not None, "every planned cell has a result"
        yield _row(study, target, against, ours, theirs)


def _matches(cell: Cell, target: Target) -> bool:
    return all(cell.params.get(name) == value for name, value in target.where.items() if name not in cell.arm.overrides)


def _same_point(study: Study, cell: Cell, other: Cell) -> bool:
    """A rival that overrides an axis, as ceilings do, has one cell for all points along it."""
    return all(cell.params[name] == other.params[name] for name in study.axes if name not in other.arm.overrides)


def _row(study: Study, target: Target, against: str | None, ours: Result, theirs: Result | None) -> Judged:
    params = ours.cell.params
    shown = (*SHOWN, "scope") if params["scope"] in TIMED_MODEL_SCOPES else SHOWN
    where = numbers.conditions({name: params[name] for name in shown if name in params})
    if against is not None and theirs is None:
        return _judged(study, target, against, where, None, "not run", f"The run plans no {against} to compare with.")
    found = _measure(target, ours, theirs)
    if found is None:
        return _judged(study, target, against, where, None, "not run", _missing(ours, theirs))
    apart = isinstance(found, Ratio) and not found.interleaved
    judged: tuple[TargetVerdict, str] = ("undecided", numbers.NOT_INTERLEAVED) if apart else _judge(target, found)
    verdict, reason = judged
    why = _served(ours) + _profile(ours) if verdict == "missed" else _profile(ours) if verdict == "undecided" else ""
    return _judged(study, target, against, where, found, verdict, reason + why)


def _measure(target: Target, ours: Result, theirs: Result | None) -> Mean | Ratio | None:
    if target.metric == "extra_memory":
        return _extra_memory(ours)
    assert theirs is not None
    if target.metric == "memory_share":
        peaks = [result.values.get("peak_memory_bytes") for result in (ours, theirs)]
        return Mean(peaks[0] / peaks[1], None, None, 1) if peaks[0] is not None and peaks[1] else None
    mine, rival = ours.latency_ms, theirs.latency_ms
    if target.metric == "overhead_us":
        return stats.paired_difference(_times(mine, 1e3), _times(rival, 1e3))
    if target.metric in WORK:
        counted = WORK[target.metric]
        work = ours.values.get(counted), theirs.values.get(counted)
        if not work[0] or not work[1]:
            return None
        mine, rival = _times(mine, 1 / work[0]), _times(rival, 1 / work[1])
    return stats.latency_ratio(rival, mine)


def _times(rounds: Mapping[Moment, float], factor: float) -> dict[Moment, float]:
    return {index: factor * value for index, value in rounds.items()}


def _extra_memory(ours: Result) -> Mean | None:
    """Exact, so without an interval: allocations of one step are counted, not sampled."""
    peak, gradients = ours.values.get("peak_memory_bytes"), ours.values.get("gradient_bytes")
    if peak is None or gradients is None:
        return None
    params = ours.cell.params
    matrix = int(params["batch"]) * int(params["queries"]) * int(params["width"]) * ELEMENT_BYTES[str(params.get("dtype", "float32"))]
    return Mean((peak - gradients) / matrix, None, None, 1)


def _judge(target: Target, found: Mean | Ratio) -> tuple[TargetVerdict, str]:
    """Met or missed needs the whole interval on one side of the bound; a count has no interval and needs none."""
    counted = target.metric in COUNTED
    low, high = (found.estimate, found.estimate) if counted else (found.low, found.high)
    rounds = found.rounds if isinstance(found, Ratio) else found.count
    if low is None or high is None or (not counted and rounds < MIN_ROUNDS):
        return "undecided", f"Too few rounds: {rounds} of at least {MIN_ROUNDS}."
    what = "count" if counted else "whole interval"
    if target.at_least is not None:
        bound, worst, best, sides = target.at_least, low, high, ("at or above", "below")
    else:
        # negated, smaller is better becomes larger is better
        bound, worst, best, sides = -(target.at_most or 0.0), -high, -low, ("at or below", "above")
    if worst >= bound:
        return "met", f"The {what} is {sides[0]} the target."
    if best < bound:
        return "missed", f"The {what} is {sides[1]} the target."
    return "undecided", "The target lies within the interval."


def _judged(
    study: Study, target: Target, against: str | None, where: str, found: Mean | Ratio | None, verdict: TargetVerdict, reason: str
) -> Judged:
    measured = "" if found is None else _shown(target.metric, found)
    return Judged(
        target=target, study=study, against=against, measured=measured, found=found, conditions=where, verdict=verdict, reason=reason
    )


def _missing(ours: Result, theirs: Result | None) -> str:
    for result in (ours, theirs):
        if result is not None and not result.done:
            said = f": {result.reason}" if result.reason else ""
            return f"{result.cell.arm.name} {result.status}{said}."
    return "The two were measured in no common round, or without what the metric needs."


def _served(result: Result) -> str:
    backends = result.values.get("backends") or {}
    return "".join(f" {op} was served by {name}." for op, name in sorted(backends.items()))


def _profile(result: Result) -> str:
    """Where the time of a call went, where that was measured."""
    spent: Mapping[str, float] = result.values.get("component_ms") or {}
    whole = sum(spent.values())
    if not whole:
        return ""
    parts = ", ".join(f"{name.replace('_', ' ')} {value / whole:.0%}" for name, value in sorted(spent.items(), key=lambda part: -part[1]))
    return f" Its time: {parts}."


def _shown(metric: str, found: Mean | Ratio) -> str:
    if metric == "speedup" and isinstance(found, Ratio):
        return numbers.ratio(found)
    if metric in WORK:
        scaled = [None if bound is None else 100 * bound for bound in (found.low, found.high)]
        return f"{100 * found.estimate:.1f} % {numbers.interval(scaled[0], scaled[1], 1)}".strip()
    shown = UNITS[metric](found.estimate)
    return f"{shown} {numbers.interval(found.low, found.high, 1)}".strip()
