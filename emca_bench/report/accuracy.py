"""Accuracies compared: arms over seeds, against the baseline, the floors and the stated margin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from emca_bench import stats
from emca_bench.report.arms import arm_named
from emca_bench.report.load import Result, Run, point
from emca_bench.specs import Arm, Cell, Study, Value
from emca_bench.stats import AccuracyVerdict, Mean, Sensitivity


@dataclass(frozen=True, kw_only=True)
class ArmAccuracy:
    """One arm on one data set."""

    arm: Arm
    results: Mapping[int, Result]
    """By seed, unfinished ones included."""
    seeds: Mapping[int, float]
    """mIoU in points by seed."""
    miou: Mean | None
    difference: Mean | None
    """To the baseline, in points, over common seeds."""
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

    def class_iou(self) -> dict[str, float | None]:
        """Mean over seeds of each class's IoU in points; None where the class never occurs."""
        tables = [result.values.get("class_iou") or {} for result in self.finished]
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
    """None where baseline or floor is missing."""

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return str(self.shared.get("dataset", ""))

    @property
    def label(self) -> str:
        """Data set and model."""
        return ", ".join(str(self.shared[name]) for name in ("dataset", "model") if name in self.shared)

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
        return [entry for entry in self.arms if entry.miou is not None]


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
    seeds = {name: _miou(by_seed) for name, by_seed in results.items()}
    baseline = study.baselines[0] if study.baselines else arm_named(study.arms, "masked")
    floor = arm_named(study.arms, "none")
    signal = stats.paired_difference(seeds.get(baseline or "", {}), seeds.get(floor or "", {}))
    arms = [
        _arm(arm, results[arm.name], seeds[arm.name], {} if arm.name == baseline else seeds.get(baseline or "", {}), study.margin)
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
    )


def _arm(arm: Arm, results: Mapping[int, Result], seeds: Mapping[int, float], rival: Mapping[int, float], margin: float) -> ArmAccuracy:
    difference = stats.paired_difference(seeds, rival)
    return ArmAccuracy(
        arm=arm,
        results=results,
        seeds=seeds,
        miou=stats.mean_interval(list(seeds.values())) if seeds else None,
        difference=difference,
        verdict=stats.non_inferiority(difference, margin) if difference else None,
    )


def _miou(results: Mapping[int, Result]) -> dict[int, float]:
    return {seed: float(result.values["miou"]) for seed, result in sorted(results.items()) if result.values.get("miou") is not None}
