"""Operators against the bounds of their machine: what they reach of the multiply-adds and of the memory traffic measured beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from emca_bench.report.load import Run
from emca_bench.report.speed import SpeedGroup, SpeedRow, operator_groups
from emca_bench.specs import CEILINGS


@dataclass(frozen=True)
class Ceiling:
    """A rate that this machine was seen to reach in the same study: FLOP/s or byte/s."""

    name: str
    rate: float


@dataclass(frozen=True, kw_only=True)
class KernelGroup:
    """Operators under one set of conditions, and the two ceilings above them; None where neither way to one could be measured."""

    group: SpeedGroup
    compute: Ceiling | None
    memory: Ceiling | None

    def bound_ms(self, row: SpeedRow) -> float | None:
        """Least time of a row's work at the ceilings, in milliseconds."""
        if self.compute is None or self.memory is None or row.flops is None or row.traffic_bytes is None:
            return None
        return 1e3 * max(row.flops / self.compute.rate, row.traffic_bytes / self.memory.rate)

    def reached(self, row: SpeedRow) -> float | None:
        """Share of the bound: least time over measured time."""
        bound = self.bound_ms(row)
        return None if bound is None or row.latency_ms is None else bound / row.latency_ms.estimate

    def limit(self, row: SpeedRow) -> str | None:
        """Which ceiling is the bound of a row: "compute" or "memory"."""
        if self.compute is None or self.memory is None or row.flops is None or row.traffic_bytes is None:
            return None
        return "compute" if row.flops / self.compute.rate >= row.traffic_bytes / self.memory.rate else "memory"


def kernel_groups(run: Run) -> list[list[KernelGroup]]:
    """Per study the groups of its operators, ceilings taken out of the rows."""
    studies: dict[str, list[SpeedGroup]] = {}
    for group in operator_groups(run):
        studies.setdefault(group.study.name, []).append(group)
    return [_with_ceilings(groups) for groups in studies.values()]


def flops_rate(row: SpeedRow) -> float | None:
    """FLOP/s that a row reaches."""
    return _rate(row, row.flops)


def traffic_rate(row: SpeedRow) -> float | None:
    """Byte/s of the least traffic, which an implementation that moves more does not show."""
    return _rate(row, row.traffic_bytes)


def intensity(row: SpeedRow) -> float | None:
    """FLOP per byte of the least traffic."""
    return row.flops / row.traffic_bytes if row.flops and row.traffic_bytes else None


def is_ceiling(row: SpeedRow) -> bool:
    """Whether a row is a bound and no contender."""
    return row.cell.params["op"] in CEILINGS


def _with_ceilings(groups: Sequence[SpeedGroup]) -> list[KernelGroup]:
    bounds = [row for group in groups for row in group.rows if is_ceiling(row)]
    memory = _best([row for row in bounds if row.cell.params["op"] in ("copy", "read")], "traffic_bytes")
    found = []
    for group in groups:
        rows = [row for row in group.rows if not is_ceiling(row)]
        if not rows:
            continue
        dtype = rows[0].cell.params.get("dtype", "float32")
        able = [row for row in bounds if row.cell.params["op"] == "burst" or _is_matmul(row, str(dtype))]
        names = set(rows[0].cell.params)
        shared = {
            name: rows[0].cell.params[name] for name in names if all(row.cell.params.get(name) == rows[0].cell.params[name] for row in rows)
        }
        ordered = {name: value for name, value in rows[0].cell.params.items() if name in shared}
        found.append(KernelGroup(group=replace(group, rows=rows, shared=ordered), compute=_best(able, "flops"), memory=memory))
    return found


def _is_matmul(row: SpeedRow, dtype: str) -> bool:
    return row.cell.params["op"] == "matmul" and row.cell.params.get("dtype", "float32") == dtype


def _best(rows: Sequence[SpeedRow], work: str) -> Ceiling | None:
    rates = [Ceiling(str(row.cell.params["op"]), rate) for row in rows if (rate := _rate(row, getattr(row, work)))]
    return max(rates, key=lambda ceiling: ceiling.rate, default=None)


def _rate(row: SpeedRow, work: int | None) -> float | None:
    return None if work is None or row.latency_ms is None else 1e3 * work / row.latency_ms.estimate
