"""Studies as frozen dataclasses: what is measured, over which axes, against which published claims."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from emca_bench.errors import UsageError, did_you_mean, listing
from emca_bench.specs.parameters import TRAINING_PARAMETERS, Value

SCHEMA = 1
"""Version of the record and key format; records of another schema are never mixed in."""

COST_SUFFIX = "-cost"
"""Ends the name of the study that a table [cost] adds: what the trained configurations cost."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a study is timed."""

    rounds: int = 7
    """Interleaved rounds; each cell is measured once per round, in shuffled order."""
    min_seconds: float = 0.2
    """A round of a cell goes on at least this long ..."""
    min_samples: int = 3
    """... and has at least this many samples,"""
    max_samples: int = 64
    """and at most this many."""
    seed: int = 0
    """Order of the cells within a round, and the random inputs."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.min_samples < 1 or self.max_samples < self.min_samples or self.min_seconds < 0:
            raise UsageError(f"settings need rounds >= 1 and 1 <= min_samples <= max_samples, min_seconds >= 0; found {self}")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One contender: an attention of the registry with its switches, under the name that reports print."""

    name: str
    attention: str
    switches: Mapping[str, Value] = field(default_factory=dict)
    overrides: Mapping[str, Value] = field(default_factory=dict)
    """Parameters that this arm sets itself, for example mask_source."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A published claim, and where in the study its measured counterpart stands."""

    claim: str
    metric: str
    """speedup, fps, gmacs (1e9 multiply-adds as fvcore counts them), miou or miou_difference."""
    value: float
    arm: str
    source: str
    against: tuple[str, ...] = ()
    """Baselines of a ratio or a difference; one row each."""
    where: Mapping[str, Value] = field(default_factory=dict)
    tolerance: float = 0.05
    """Relative for ratios, fps and gmacs, absolute (in points) for mIoU."""
    hardware: str = "unstated"
    dataset: str = ""
    """Data set of the claim; a counterpart on other data is not comparable."""


METRICS = ("speedup", "fps", "gmacs", "miou", "miou_difference")


@dataclass(frozen=True, kw_only=True)
class Target:
    """A bound that the project set itself before measuring, at least or at most, and where in the study its number stands."""

    target: str
    metric: str
    """One of TARGET_METRICS."""
    arm: str
    against: tuple[str, ...] = ()
    """Rivals or ceilings; one row each. A rival that overrides an axis stands for all points along it."""
    at_least: float | None = None
    at_most: float | None = None
    where: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise UsageError(f"a target needs either at_least or at_most; found {self.at_least} and {self.at_most}")
        if bool(self.against) != TARGET_METRICS[self.metric]:
            needs = "arms to stand against" if TARGET_METRICS[self.metric] else "no 'against'"
            raise UsageError(f"metric {self.metric!r} needs {needs}; found {listing(self.against) or 'none'}")


TARGET_METRICS = {
    "speedup": True,
    "rate_share": True,
    "traffic_share": True,
    "overhead_us": True,
    "memory_share": True,
    "extra_memory": False,
}
"""Whether a metric compares arms. speedup: latency of the other over the arm's. rate_share: FLOP/s of the arm over the other's.
traffic_share: the same of bytes per second, by the least traffic. overhead_us: latency of the arm minus the other's, in microseconds.
memory_share: peak memory of the arm over the other's. extra_memory: peak of a training step beyond inputs, parameters and the gradients
of features and parameters, in matrices of queries (Q x C elements)."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One configuration to measure: an arm at one point of the axes."""

    study: str
    measures: tuple[str, ...]
    method: int
    arm: Arm
    params: Mapping[str, Value]

    def key(self, measure: str) -> str:
        """16 hex digits that identify this cell and measure; the identity under which a run resumes."""
        identity = {
            "schema": SCHEMA,
            "study": self.study,
            "method": self.method,
            "measure": measure,
            "arm": [self.arm.name, self.arm.attention, dict(self.arm.switches)],
            "params": dict(self.params),
        }
        return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:16]

    def label(self) -> str:
        """One line for progress and errors."""
        shown = ("scope", "op", "model", "pixels", "pass", "image_size", "dataset", "seed")
        return " ".join([self.arm.name, *(f"{name}={self.params[name]}" for name in shown if name in self.params)])


@dataclass(frozen=True, kw_only=True)
class Study:
    """A resolved study file."""

    name: str
    title: str
    question: str
    measures: tuple[str, ...]
    baselines: tuple[str, ...]
    arms: tuple[Arm, ...]
    axes: Mapping[str, tuple[Value, ...]]
    fixed: Mapping[str, Value]
    settings: Settings
    expected: tuple[Expected, ...] = ()
    targets: tuple[Target, ...] = ()
    method: int = 1
    margin: float = 0.5
    """Non-inferiority margin of accuracy in points of mIoU, or of PQ where the task is panoptic, stated before the run."""
    quick: bool = False

    def cells(self) -> list[Cell]:
        """Every point of the axes for every arm, arms innermost so that rivals are measured side by side.

        An arm that overrides an axis has one cell along it.
        """
        names = list(self.axes)
        cells: dict[str, Cell] = {}
        for values in itertools.product(*(self.axes[name] for name in names)):
            for arm in self.arms:
                params = {**self.fixed, **dict(zip(names, values, strict=True)), **arm.overrides}
                cell = Cell(study=self.name, measures=self.measures, method=self.method, arm=arm, params=MappingProxyType(params))
                cells.setdefault(cell.key(self.measures[0]), cell)
        return list(cells.values())

    def only(self, conditions: Mapping[str, str]) -> Study:
        """The part of the study where parameters (or `arm`) equal the given values, compared as text."""
        study = self
        for name, wanted in conditions.items():
            if name in TRAINING_PARAMETERS and self.name.endswith(COST_SUFFIX):
                continue
            if name == "arm":
                known = [arm.name for arm in self.arms]
                kept = tuple(arm for arm in study.arms if arm.name == wanted)
                if not kept:
                    raise UsageError(f"study {self.name!r} has no arm {wanted!r}{did_you_mean(wanted, known)}; its arms: {listing(known)}")
                study = replace(study, arms=kept)
            elif name in self.axes:
                found = tuple(value for value in self.axes[name] if str(value) == wanted)
                if not found:
                    raise UsageError(
                        f"axis {name!r} of study {self.name!r} has no value {wanted!r}; its values: {listing(map(str, self.axes[name]))}"
                    )
                study = replace(study, axes={**study.axes, name: found})
            elif name not in self.fixed or str(self.fixed[name]) != wanted:
                raise UsageError(
                    f"study {self.name!r} has no axis {name!r}{did_you_mean(name, self.axes)}; its axes: arm, {listing(self.axes)}"
                )
        return study


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no white space: the same bytes for the same value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
