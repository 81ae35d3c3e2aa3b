"""Everything that a report says about a run, computed once and shared by text, tables, figures and summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from emca_bench.report import numbers
from emca_bench.report.accuracy import AccuracyGroup, accuracy_groups
from emca_bench.report.claims import Claim, claims
from emca_bench.report.costs import costs
from emca_bench.report.counts import CountRow, attention_counts, model_counts
from emca_bench.report.kernels import KernelGroup, kernel_groups
from emca_bench.report.load import Run
from emca_bench.report.speed import SpeedGroup, SpeedRow, attention_groups, largest, model_groups
from emca_bench.report.targets import Judged, targets
from emca_bench.stats import Mean


@dataclass(frozen=True, kw_only=True)
class Findings:
    """A run and what follows from it."""

    run: Run
    claims: Sequence[Claim]
    targets: Sequence[Judged]
    kernels: Sequence[Sequence[KernelGroup]]
    attention: Sequence[SpeedGroup]
    attention_counts: Sequence[CountRow]
    model_counts: Sequence[Sequence[CountRow]]
    models: Sequence[SpeedGroup]
    accuracy: Sequence[AccuracyGroup]


def findings(run: Run) -> Findings:
    """Compute them."""
    return Findings(
        run=run,
        claims=claims(run),
        targets=targets(run),
        kernels=kernel_groups(run),
        attention=attention_groups(run),
        attention_counts=attention_counts(run),
        model_counts=model_counts(run),
        models=model_groups(run),
        accuracy=accuracy_groups(run),
    )


@dataclass(frozen=True, kw_only=True)
class TradeOff:
    """One arm in the plane of cost and quality."""

    arm: str
    latency_ms: Mean
    score: Mean


def trade_offs(found: Findings, group: AccuracyGroup) -> tuple[str, list[TradeOff]]:
    """Arms of an accuracy group with their latency in the same run, and what that latency is of.

    Taken from the first that joins at least two arms: the study's own costs; model, end to end, decoder (same model name, largest images);
    cross-attention alone (most pixels). Empty where none does.
    """
    own = costs(found.models, group)
    joined = _join(group, dict(own), same_study=True)
    if len(joined) > 1:
        params = next(iter(own.values())).cell.params
        return f"latency in ms ({numbers.SCOPE_NAMES[str(params['scope'])]}, {numbers.size(params['image_size'])} images)", joined
    for scope in ("model", "end_to_end", "decoder"):
        same = [g for g in found.models if g.shared.get("scope") == scope and g.shared.get("model") == group.shared.get("model")]
        same.sort(key=lambda g: max(row.pixels for row in g.rows), reverse=True)
        for candidate in same:
            joined = _join(group, {row.arm: row for row in candidate.rows})
            if len(joined) > 1:
                where = f"{numbers.SCOPE_NAMES[scope]}, {numbers.size(candidate.shared.get('image_size', ''))} images"
                return f"latency in ms ({where})", joined
    for candidate in found.attention:
        rows = {arm: largest(candidate, arm) for arm in candidate.arms}
        most = max((row.pixels for row in rows.values() if row), default=0)
        joined = _join(group, {arm: row for arm, row in rows.items() if row and row.pixels == most})
        if len(joined) > 1:
            setting = {name: candidate.shared[name] for name in ("queries", "width") if name in candidate.shared}
            return f"latency of one cross-attention in ms ({numbers.plural(most, 'pixel')}, {numbers.conditions(setting)})", joined
    return "", []


def _join(group: AccuracyGroup, rows: dict[str, SpeedRow], *, same_study: bool = False) -> list[TradeOff]:
    joined = []
    for entry in group.measured:
        row = rows.get(entry.name)
        if (
            row
            and row.latency_ms
            and entry.score
            and (same_study or (row.cell.arm.attention, row.cell.arm.switches) == (entry.arm.attention, entry.arm.switches))
        ):
            joined.append(TradeOff(arm=entry.name, latency_ms=row.latency_ms, score=entry.score))
    return joined
