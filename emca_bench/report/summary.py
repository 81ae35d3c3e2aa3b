"""The report's numbers as JSON, for README tables and for checks in CI."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from emca_bench import stats
from emca_bench.report.accuracy import AccuracyGroup, ArmAccuracy
from emca_bench.report.answer import answer
from emca_bench.report.arms import subject
from emca_bench.report.claims import Claim
from emca_bench.report.costs import costs, pareto_arms, recommend
from emca_bench.report.counts import CountRow
from emca_bench.report.findings import Findings
from emca_bench.report.kernels import KernelGroup, flops_rate, traffic_rate
from emca_bench.report.speed import SpeedGroup, SpeedRow, crossing, free_attention_bound
from emca_bench.report.targets import Judged
from emca_bench.stats import Mean, Ratio, speed_verdict

SUMMARY_SCHEMA = 1
DIGITS = 6
"""Significant digits: more would differ between versions of NumPy and SciPy."""


def to_json(found: Findings) -> str:
    """The summary of a run, the same text for the same run folder."""
    return json.dumps(_rounded(summary(found)), indent=1, ensure_ascii=False) + "\n"


def summary(found: Findings) -> dict[str, Any]:
    """Plain data: status counts, claims, and one entry per measured row."""
    run = found.run
    statuses = ("ok", "partial", "failed", "impossible", "not run")
    return {
        "schema": SUMMARY_SCHEMA,
        "context": run.context,
        "quick": run.quick,
        "command": " && ".join(run.environment.commands),
        "identity": dict(run.environment.identity),
        "answer": answer(found),
        "measurements": {status: sum(result.status == status for result in run.results.values()) for status in statuses},
        "scheduler_tick_ms": {study.name: run.scheduler_tick(study) for study in run.studies if "latency" in study.measures},
        "claims": [_claim(claim) for claim in found.claims],
        "attention": [_row(group, row) for group in found.attention for row in group.rows],
        "crossovers": [entry for group in found.attention for entry in _crossings(group)],
        "counts": [_count(row) for group in found.model_counts for row in group],
        "speed": [_row(group, row) for group in found.models for row in group.rows],
        "bounds": [entry for group in found.models for entry in _bounds(group)],
        "accuracy": [{**_accuracy(group), **_recommended(found, group)} for group in found.accuracy],
        **_kernels(found),
    }


def _kernels(found: Findings) -> dict[str, Any]:
    """Operators and targets, of runs that have them."""
    operators = [_operator(group, row) for groups in found.kernels for group in groups for row in group.group.rows]
    judged = [_target(row) for row in found.targets]
    return {name: entries for name, entries in (("kernels", operators), ("targets", judged)) if entries}


def _operator(group: KernelGroup, row: SpeedRow) -> dict[str, Any]:
    ceilings = {"compute": group.compute, "memory": group.memory}
    return {
        **_row(group.group, row),
        "flops": row.flops,
        "least_bytes": row.traffic_bytes,
        "flops_per_second": flops_rate(row),
        "bytes_per_second": traffic_rate(row),
        "ceilings": {name: ceiling and {"measured_by": ceiling.name, "per_second": ceiling.rate} for name, ceiling in ceilings.items()},
        "share_of_bound": group.reached(row),
    }


def _target(row: Judged) -> dict[str, Any]:
    return {
        "study": row.study.name,
        "target": row.target.target,
        "metric": row.target.metric,
        "arm": row.target.arm,
        "against": row.against,
        "at_least": row.target.at_least,
        "at_most": row.target.at_most,
        "measured": _interval(row.found),
        "conditions": row.conditions,
        "verdict": row.verdict,
        "reason": row.reason,
    }


def _claim(claim: Claim) -> dict[str, Any]:
    return {
        "study": claim.study.name,
        "claim": claim.expected.claim,
        "metric": claim.expected.metric,
        "arm": claim.expected.arm,
        "against": claim.against,
        "published": claim.expected.value,
        "measured": claim.estimate,
        "low": claim.low,
        "high": claim.high,
        "conditions": claim.conditions,
        "verdict": claim.verdict,
        "reason": claim.reason,
    }


def _row(group: SpeedGroup, row: SpeedRow) -> dict[str, Any]:
    speedups = {name: {**_interval(ratio), "verdict": speed_verdict(ratio)} for name, ratio in row.speedups.items()}
    return {
        "study": group.study.name,
        "arm": row.arm,
        "params": dict(row.cell.params),
        "status": row.status,
        "latency_ms": _interval(row.latency_ms),
        "frames_per_second": row.frames_per_second,
        "speedup": speedups,
        "macs": row.macs,
        "peak_memory_bytes": row.peak_memory_bytes,
    }


def _crossings(group: SpeedGroup) -> list[dict[str, Any]]:
    name = subject(group.study)
    baselines = [baseline for baseline in group.study.baselines if baseline != name] if name else []
    return [
        {"study": group.study.name, "arm": name, "against": baseline, "pixels": crossing(group, str(name), baseline)}
        for baseline in baselines
    ]


def _count(row: CountRow) -> dict[str, Any]:
    return {
        "study": row.study.name,
        "arm": row.arm,
        "params": dict(row.cell.params),
        "macs": row.macs,
        "components": dict(row.components),
        "parameters": row.parameters,
        "cross_attention_bound": row.bound,
        **({"fvcore_macs": row.by_fvcore.macs} if row.by_fvcore else {}),
    }


def _bounds(group: SpeedGroup) -> list[dict[str, Any]]:
    found = [(baseline, free_attention_bound(group, baseline)) for baseline in group.study.baselines]
    where = {name: group.shared[name] for name in ("scope", "model", "image_size") if name in group.shared}
    return [{"study": group.study.name, "params": where, "against": baseline, **_interval(bound)} for baseline, bound in found if bound]


def _accuracy(group: AccuracyGroup) -> dict[str, Any]:
    arms = {
        entry.name: {
            **{metric.key: _interval(entry.means.get(metric.key)) for metric in group.metrics},
            "seeds": {str(seed): value for seed, value in entry.seeds.items()},
            "difference": _interval(entry.difference),
            "verdict": entry.verdict,
            **_differences(group, entry),
        }
        for entry in group.arms
    }
    return {
        "study": group.study.name,
        "dataset": group.dataset,
        "params": dict(group.shared),
        "margin": group.study.margin,
        "baseline": group.baseline,
        "sensitivity": group.sensitivity,
        "frequency_miou": group.fact("frequency_miou"),
        "arms": arms,
        **_together(group),
    }


def _together(group: AccuracyGroup) -> dict[str, Any]:
    """All arms against the baseline at once, of the metric that is judged."""
    found = group.together.get(group.metric.key)
    if found is None:
        return {}
    arms = {
        name: {
            "alone": _interval(joint.mean(joint.alone)),
            "together": _interval(joint.mean(joint.together)),
            "verdict": stats.joint_verdict(found, name, group.study.margin),
            "scatter": found.scatter[name],
        }
        for name, joint in found.arms.items()
    }
    return {"together": {"scatter": found.pooled, "arms": arms}}


def _recommended(found: Findings, group: AccuracyGroup) -> dict[str, Any]:
    """The front and the arm that the rule chooses, where the costs of the arms are known."""
    rows = costs(found.models, group)
    if not rows:
        return {}
    chosen = recommend(group, rows)
    return {"pareto_front": pareto_arms(group, rows), "recommended": {"arm": chosen.arm, "reason": chosen.reason}}


def _differences(group: AccuracyGroup, entry: ArmAccuracy) -> dict[str, Any]:
    """Of every metric, where the task has more than one."""
    if len(group.metrics) == 1:
        return {}
    return {"differences": {metric.key: _interval(entry.differences.get(metric.key)) for metric in group.metrics}}


def _interval(value: Ratio | Mean | None) -> dict[str, Any]:
    if value is None:
        return {"estimate": None, "low": None, "high": None, "repeats": 0}
    repeats = value.rounds if isinstance(value, Ratio) else value.count
    return {"estimate": value.estimate, "low": value.low, "high": value.high, "repeats": repeats}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, (list, tuple)) else value
