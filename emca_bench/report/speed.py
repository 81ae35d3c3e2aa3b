"""Latencies compared: every arm against every baseline of its study, under equal conditions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from emca_bench import stats
from emca_bench.report.load import Moment, Result, ResultStatus, Run, point
from emca_bench.report.numbers import area
from emca_bench.specs import TIMED_MODEL_SCOPES, Cell, Study, Value
from emca_bench.stats import Mean, Ratio

KERNEL_SCOPES = ("kernel",)
ATTENTION_SCOPES = ("attention",)


@dataclass(frozen=True, kw_only=True)
class SpeedRow:
    """One arm under one set of conditions."""

    cell: Cell
    status: ResultStatus
    reason: str
    rounds_ms: Mapping[Moment, float]
    """Median latency of a call, by session and round."""
    latency_ms: Mean | None
    """Geometric mean of the round medians."""
    speedups: Mapping[str, Ratio]
    """Latency of each baseline over this one's; a baseline is not compared with itself."""
    macs: int | None = None
    peak_memory_bytes: int | None = None
    energy_j: float | None = None
    """Of an image; None where the machine did not tell."""
    backends: Mapping[str, str] = field(default_factory=dict)
    """What served each kernel operator, and why."""
    flops: int | None = None
    """Floating-point operations of a call (scope kernel)."""
    traffic_bytes: int | None = None
    """Least memory traffic of a call (scope kernel)."""

    @property
    def arm(self) -> str:
        """Name of the arm."""
        return self.cell.arm.name

    @property
    def pixels(self) -> int:
        """Pixels of the feature level (scopes kernel and attention), or of an image."""
        params = self.cell.params
        return area(params["pixels"] if "pixels" in params else params["image_size"])

    @property
    def frames_per_second(self) -> float | None:
        """Images per second at this batch size."""
        batch = self.cell.params.get("batch", 1)
        return None if self.latency_ms is None else 1000 * float(batch) / self.latency_ms.estimate


@dataclass(frozen=True, kw_only=True)
class SpeedGroup:
    """Rows of one study that may be compared, and swept rows along one axis."""

    study: Study
    shared: Mapping[str, Value]
    """Parameters that are equal in all rows."""
    rows: Sequence[SpeedRow]

    def of(self, arm: str) -> list[SpeedRow]:
        """The rows of an arm."""
        return [row for row in self.rows if row.arm == arm]

    def measured(self, arm: str) -> list[SpeedRow]:
        """The rows of an arm that have a latency."""
        return [row for row in self.of(arm) if row.latency_ms is not None]

    @property
    def arms(self) -> list[str]:
        """Arms in the order of the study."""
        return list(dict.fromkeys(row.arm for row in self.rows))


def operator_groups(run: Run) -> list[SpeedGroup]:
    """Single operators and ceilings: one group per setting of the axes other than pixels."""
    return _groups(run, KERNEL_SCOPES, swept="pixels")


def attention_groups(run: Run) -> list[SpeedGroup]:
    """Cross-attention alone: one group per setting of the axes other than pixels, rows swept over pixels."""
    return _groups(run, ATTENTION_SCOPES, swept="pixels")


def model_groups(run: Run) -> list[SpeedGroup]:
    """Decoder, model and end to end: one group per point of the axes."""
    return _groups(run, TIMED_MODEL_SCOPES, swept=None)


def first_baseline(group: SpeedGroup) -> str | None:
    """The first baseline of the study that has a latency here: not every rival can do everything."""
    return next((name for name in group.study.baselines if group.measured(name)), None)


def without_attention(group: SpeedGroup) -> SpeedRow | None:
    """The measured row of the first arm that has no cross-attention."""
    return next((row for row in group.rows if row.cell.arm.attention == "none" and row.latency_ms), None)


def free_attention_bound(group: SpeedGroup, baseline: str) -> Ratio | None:
    """Measured upper bound of any speedup over a baseline: its latency over that of the arm that differs by having no cross-attention."""
    against = next((row.cell.arm for row in group.rows if row.arm == baseline), None)
    for row in group.rows:
        arm = row.cell.arm
        if against is not None and arm.attention == "none" and arm.overrides == against.overrides:
            return row.speedups.get(baseline)
    return None


def crossing(group: SpeedGroup, arm: str, baseline: str) -> float | None:
    """Number of pixels at which the curves of an arm and a baseline cross for the last time, or None."""
    ours = {row.pixels: row.latency_ms.estimate for row in group.measured(arm) if row.latency_ms}
    theirs = {row.pixels: row.latency_ms.estimate for row in group.measured(baseline) if row.latency_ms}
    common = sorted(set(ours) & set(theirs))
    return stats.crossover(common, [theirs[pixels] for pixels in common], [ours[pixels] for pixels in common])


def largest(group: SpeedGroup, arm: str) -> SpeedRow | None:
    """The measured row of an arm at the most pixels."""
    return max(group.measured(arm), key=lambda row: row.pixels, default=None)


def _groups(run: Run, scopes: Iterable[str], *, swept: str | None) -> list[SpeedGroup]:
    groups = []
    for study, cells in run.planned("latency", scopes):
        by_setting: dict[object, list[Cell]] = {}
        for cell in cells:
            by_setting.setdefault(point(study, cell, without=[swept] if swept else []), []).append(cell)
        groups += [_group(run, study, members) for members in by_setting.values()]
    return groups


def _group(run: Run, study: Study, cells: Sequence[Cell]) -> SpeedGroup:
    first = cells[0].params
    shared = {name: value for name, value in first.items() if all(cell.params.get(name) == value for cell in cells)}
    latencies = {cell.key("latency"): _latency(run, cell) for cell in cells}
    baselines = {(point(study, cell), cell.arm.name): latencies[cell.key("latency")].latency_ms for cell in cells}
    rows = []
    for cell in cells:
        result = latencies[cell.key("latency")]
        rounds = result.latency_ms
        rivals = {name: baselines.get((point(study, cell), name), {}) for name in study.baselines if name != cell.arm.name}
        rows.append(
            SpeedRow(
                cell=cell,
                status=result.status,
                reason=result.reason,
                rounds_ms=rounds,
                latency_ms=stats.geometric_mean(rounds) if rounds else None,
                speedups={name: ratio for name, rival in rivals.items() if (ratio := stats.latency_ratio(rival, rounds))},
                macs=_value(run.find(cell, "macs"), "macs"),
                peak_memory_bytes=_value(run.find(cell, "memory"), "peak_memory_bytes"),
                energy_j=_mean([record.values.get("energy_per_image_j") for record in result.done.values()]),
                backends=result.values.get("backends") or {},
                flops=_value(result, "flops"),
                traffic_bytes=_value(result, "bytes"),
            )
        )
    return SpeedGroup(study=study, shared=shared, rows=rows)


def _latency(run: Run, cell: Cell) -> Result:
    result = run.find(cell, "latency")
    assert result is not None, "every planned latency has a result"
    return result


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _value(result: Result | None, name: str) -> int | None:
    found = result.values.get(name) if result else None
    return None if found is None else int(found)
