"""Accuracies compared: arms over seeds, against the baseline, the floors and the stated margin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from emca_bench import stats
from emca_bench.report.arms import arm_named
from emca_bench.report.load import Result, Run, data_versions, point
from emca_bench.specs import Arm, Cell, Study, Value
from emca_bench.stats import AccuracyVerdict, JointDifferences, Mean, Sensitivity

_Seeds = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Metric:
    """A recorded accuracy in points: its name in records, and in print."""

    key: str
    label: str


METRICS = {
    "semantic": (Metric("miou", "mIoU"),),
    "panoptic": (
        Metric("pq", "PQ"),
        Metric("pq_things", "PQ things"),
        Metric("pq_stuff", "PQ stuff"),
        Metric("ap", "AP"),
        Metric("miou", "mIoU"),
    ),
}
"""By task; verdicts rest on the first."""


@dataclass(frozen=True, kw_only=True)
class ArmAccuracy:
    """One arm on one data set."""

    arm: Arm
    results: Mapping[int, Result]
    """By seed, unfinished ones included."""
    seeds: Mapping[int, float]
    """The task's first metric in points by seed."""
    means: Mapping[str, Mean]
    """By metric, in points over seeds."""
    differences: Mapping[str, Mean]
    """By metric, to the baseline over common seeds; empty for the baseline itself."""
    score: Mean | None
    """Of the task's first metric; None for arms without results."""
    difference: Mean | None
    """Of the task's first metric."""
    verdict: AccuracyVerdict | None
    """None for the baseline itself and for arms without results."""

    @property
    def name(self) -> str:
        """Name of the arm."""
        return self.arm.name

    @property
    def finished(self) -> list[Result]:
        """Results that have a record."""
        return [result for result in self.results.values() if result.done]

    def average(self, name: str) -> float | None:
        """Mean over seeds of a recorded value."""
        found = [result.values[name] for result in self.finished if result.values.get(name) is not None]
        return float(np.mean(found)) if found else None

    def points(self, metric: Metric) -> list[float]:
        """A metric of every seed that has it, in the order of seeds."""
        return [float(result.values[metric.key]) for _, result in sorted(self.results.items()) if result.values.get(metric.key) is not None]

    def by_class(self, name: str) -> dict[str, float | None]:
        """Mean over seeds of a value that is recorded per class, in points; None where the class never occurs."""
        tables = [result.values.get(name) or {} for result in self.finished]
        means: dict[str, float | None] = {}
        for name in dict.fromkeys(name for table in tables for name in table):
            found = [table[name] for table in tables if table.get(name) is not None]
            means[name] = float(np.mean(found)) if found else None
        return means

    def curves(self) -> dict[int, tuple[list[float], list[float]]]:
        """Training steps and losses by seed."""
        samples = {seed: result.done[0].samples for seed, result in self.results.items() if 0 in result.done}
        return {seed: (found["loss_step"], found["loss"]) for seed, found in samples.items() if found.get("loss")}


@dataclass(frozen=True, kw_only=True)
class AccuracyGroup:
    """Arms trained and tested alike."""

    study: Study
    shared: Mapping[str, Value]
    """Parameters that are equal in all cells."""
    arms: Sequence[ArmAccuracy]
    baseline: str | None
    floor: str | None
    """The arm without cross-attention."""
    signal: Mean | None
    """Baseline minus floor, in points."""
    sensitivity: Sensitivity | None
    """None where baseline or floor is missing, or the images are not the same in all cells."""
    together: Mapping[str, JointDifferences]
    """By metric, all arms against the baseline at once; empty where too few can be compared."""
    same_images: bool
    """Whether all finished cells saw the same files; where not, nothing is compared."""

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return str(self.shared.get("dataset", ""))

    @property
    def task(self) -> str:
        """What was trained and evaluated."""
        return _task(self.shared)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What is compared; verdicts rest on the first."""
        return METRICS[self.task]

    @property
    def metric(self) -> Metric:
        """What verdicts rest on."""
        return self.metrics[0]

    @property
    def label(self) -> str:
        """Data set and model, and where on the axes of the study."""
        swept = [name for name, values in self.study.axes.items() if len(values) > 1 and name not in ("seed", "dataset", "model")]
        return ", ".join(
            [
                *(str(self.shared[name]) for name in ("dataset", "model") if name in self.shared),
                *(f"{name.replace('_', ' ')} {self.shared[name]}" for name in swept if name in self.shared),
            ]
        )

    def arm(self, name: str | None) -> ArmAccuracy | None:
        """An arm by name."""
        return next((entry for entry in self.arms if entry.name == name), None)

    def fact(self, name: str) -> Any:
        """A recorded value that does not depend on the arm; None if nothing finished."""
        for entry in self.arms:
            for result in entry.finished:
                if result.values.get(name) is not None:
                    return result.values[name]
        return None

    @property
    def measured(self) -> list[ArmAccuracy]:
        """Arms with at least one finished seed."""
        return [entry for entry in self.arms if entry.score is not None]


def accuracy_groups(run: Run) -> list[AccuracyGroup]:
    """One group per study and point of the axes other than the seed."""
    groups = []
    for study, cells in run.planned("accuracy"):
        by_setting: dict[object, list[Cell]] = {}
        for cell in cells:
            by_setting.setdefault(point(study, cell, without=["seed"]), []).append(cell)
        groups += [_group(run, study, members) for members in by_setting.values()]
    return groups


def _group(run: Run, study: Study, cells: Sequence[Cell]) -> AccuracyGroup:
    first = cells[0].params
    shared = {name: value for name, value in first.items() if name != "seed" and all(cell.params.get(name) == value for cell in cells)}
    results: dict[str, dict[int, Result]] = {}
    for cell in cells:
        result = run.find(cell, "accuracy")
        assert result is not None, "every planned accuracy has a result"
        results.setdefault(cell.arm.name, {})[int(cell.params.get("seed", 0))] = result
    metrics = METRICS[_task(shared)]
    seeds = {name: {metric.key: _points(by_seed, metric) for metric in metrics} for name, by_seed in results.items()}
    baseline = study.baselines[0] if study.baselines else arm_named(study.arms, "masked")
    floor = arm_named(study.arms, "none")
    judged, nothing = metrics[0].key, {metric.key: dict[int, float]() for metric in metrics}
    same = len(data_versions(result for by_seed in results.values() for result in by_seed.values())) <= 1
    rival = seeds.get(baseline or "", nothing) if same else nothing
    signal = stats.paired_difference(rival[judged], seeds.get(floor or "", nothing)[judged])
    arms = [
        _arm(arm, results[arm.name], seeds[arm.name], nothing if arm.name == baseline else rival, study.margin)
        for arm in study.arms
        if arm.name in results
    ]
    return AccuracyGroup(
        study=study,
        shared=shared,
        arms=arms,
        baseline=baseline,
        floor=floor,
        signal=signal,
        sensitivity=stats.sensitivity(signal, study.margin) if signal else None,
        together=_together(seeds, metrics, baseline) if baseline in seeds and same else {},
        same_images=same,
    )


def _together(seeds: Mapping[str, _Seeds], metrics: Sequence[Metric], baseline: str) -> dict[str, JointDifferences]:
    found = {}
    for metric in metrics:
        joint = stats.joint_differences({name: mine[metric.key] for name, mine in seeds.items()}, baseline)
        if joint is not None:
            found[metric.key] = joint
    return found


def _arm(arm: Arm, results: Mapping[int, Result], mine: _Seeds, rival: _Seeds, margin: float) -> ArmAccuracy:
    """Points of an arm and its rival by metric and seed; the first metric is judged."""
    first = next(iter(mine))
    differences = {key: stats.paired_difference(mine[key], rival[key]) for key in mine}
    difference = differences[first]
    means = {key: stats.mean_interval(list(by_seed.values())) for key, by_seed in mine.items() if by_seed}
    return ArmAccuracy(
        arm=arm,
        results=results,
        seeds=mine[first],
        means=means,
        differences={key: value for key, value in differences.items() if value},
        score=means.get(first),
        difference=difference,
        verdict=stats.non_inferiority(difference, margin) if difference else None,
    )


def _task(params: Mapping[str, Value]) -> str:
    return str(params.get("task", "semantic"))


def _points(results: Mapping[int, Result], metric: Metric) -> dict[int, float]:
    found = {seed: result.values.get(metric.key) for seed, result in sorted(results.items())}
    return {seed: float(value) for seed, value in found.items() if value is not None}
