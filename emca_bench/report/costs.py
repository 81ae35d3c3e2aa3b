"""What the configurations that were trained cost, and which of them a rule stated beforehand recommends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from emca_bench import stats
from emca_bench.report import numbers
from emca_bench.report.accuracy import AccuracyGroup, ArmAccuracy
from emca_bench.report.document import Column, Table, Value
from emca_bench.report.speed import SpeedGroup, SpeedRow
from emca_bench.report.tables import EMPTY, arm, latency, number
from emca_bench.specs import COST_SUFFIX

SHARED = ("layers", "attention_layers", "other_attention", "mask_use", "queries", "width", "mask_source", "mask_rule")
"""Parameters that make a configuration another one; batch and classes differ by design."""

NEAR = 0.02
"""Arms whose latency is within this of the lowest count as equally fast, as everywhere else."""

RULE = (
    "Rule, stated before the run: of the arms that are not worse than the baseline by the margin, on data that can decide, the fastest; "
    f"among those within {NEAR:.0%} of it the most accurate. Verdicts are for each arm alone, not corrected for their number."
)


def costs(models: Sequence[SpeedGroup], group: AccuracyGroup) -> dict[str, SpeedRow]:
    """By arm, the row of the same configuration in the study of costs that the group's study brought along."""
    rows = [row for found in models if found.study.name == group.study.name + COST_SUFFIX for row in found.rows]
    matched = {}
    for entry in group.arms:
        row = next((row for row in rows if row.arm == entry.name and _same_point(row, entry)), None)
        if row is not None:
            matched[entry.name] = row
    return matched


def _same_point(row: SpeedRow, entry: ArmAccuracy) -> bool:
    params = next(iter(entry.results.values())).cell.params
    return all(row.cell.params.get(name) == params.get(name) for name in SHARED)


def cost_table(group: AccuracyGroup, rows: dict[str, SpeedRow]) -> Table | None:
    """Accuracy beside multiply-adds, latency and memory of the same configuration; None where nothing is known of any."""
    if not rows or not group.measured:
        return None
    front = set(pareto_arms(group, rows))
    columns = [Column("Arm"), Column(f"{group.metric.label} ± 95 %", "right"), Column("GMACs", "right"), Column("ms [95 %]", "right")]
    columns += [Column("Peak MiB", "right"), Column("On the Pareto front")]
    shown = []
    for entry in group.measured:
        row = rows.get(entry.name)
        score = EMPTY if entry.score is None else Value(numbers.points(entry.score), sort=entry.score.estimate)
        if row is None:
            shown.append([arm(entry.name), score, *[EMPTY] * 4])
            continue
        memory = number(row.peak_memory_bytes, numbers.mebibytes)
        on_front = Value("yes", tone="good") if entry.name in front else EMPTY
        shown.append([arm(entry.name), score, number(row.macs, numbers.gmacs), latency(row), memory, on_front])
    params = next(iter(rows.values())).cell.params
    where = f"{numbers.SCOPE_NAMES[str(params['scope'])]}, {numbers.size(params['image_size'])} images, batch {params['batch']}"
    return Table(columns, shown, f"Cost: one call of the same configuration ({where}). Front: no arm is both faster and more accurate.")


def pareto_arms(group: AccuracyGroup, rows: dict[str, SpeedRow]) -> list[str]:
    """Arms that no other beats in latency and accuracy, by rising latency."""
    known = [(entry, found) for entry in group.measured if (found := _milliseconds(rows, entry)) is not None and entry.score]
    front = stats.pareto_front([found for _, found in known], [entry.score.estimate for entry, _ in known if entry.score])
    return [known[index][0].name for index in front]


def _milliseconds(rows: dict[str, SpeedRow], entry: ArmAccuracy) -> float | None:
    row = rows.get(entry.name)
    return None if row is None or row.latency_ms is None else row.latency_ms.estimate


@dataclass(frozen=True)
class Recommendation:
    """The arm that RULE chooses, or None and why."""

    arm: str | None
    reason: str


def recommend(group: AccuracyGroup, rows: dict[str, SpeedRow]) -> Recommendation:
    """Apply RULE to a group."""
    if group.sensitivity != "can decide":
        return Recommendation(None, f"whether {group.dataset} can tell cross-attentions apart is {_decides(group)}")
    baseline = group.arm(group.baseline)
    passed = [entry for entry in group.measured if entry.verdict == "not worse" and entry.name != group.floor]
    if not passed:
        return Recommendation(None, f"no arm is shown to lose less than {group.study.margin:g} {group.metric.label}")
    timed = {entry.name: ms for entry in passed if (ms := _milliseconds(rows, entry)) is not None}
    if not timed:
        return Recommendation(None, "this run holds no latencies of the arms that are not worse")
    reference = None if baseline is None else _milliseconds(rows, baseline)
    if reference is not None and min(timed.values()) >= reference * (1 - NEAR):
        return Recommendation(None, "no arm that is not worse is faster than the baseline")
    near = [entry for entry in passed if entry.name in timed and timed[entry.name] <= min(timed.values()) * (1 + NEAR)]
    best = max(near, key=lambda entry: entry.score.estimate if entry.score else float("-inf"))
    return Recommendation(best.name, f"{timed[best.name]:.3g} ms, not worse than {group.baseline} by the margin")


def _decides(group: AccuracyGroup) -> str:
    return "refuted" if group.sensitivity == "cannot decide" else "undecided"
