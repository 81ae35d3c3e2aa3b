"""Two runs side by side, latency by latency: two commits, two machines, two versions of torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from emca_bench import stats
from emca_bench.errors import UsageError
from emca_bench.report import numbers
from emca_bench.report.load import Run, load_run

_CAUTION = f"The runs were not interleaved ({numbers.APART}): a drift of the machine between them looks like a difference."


def compare_runs(first: Path, second: Path) -> str:
    """Latencies of the cells that both runs hold, as text for a terminal: ratio first / second, above 1 the second is faster.

    Raises:
        UsageError: not a run folder, or no cell in common.
    """
    a, b = load_run(first), load_run(second)
    rows, verdicts = [], Counter[str]()
    for key, result in a.results.items():
        other = b.results.get(key)
        if result.measure != "latency" or other is None or not result.latency_ms or not other.latency_ms:
            continue
        before, after = result.latency_ms, other.latency_ms
        ratio = stats.unpaired_ratio(list(before.values()), list(after.values()))
        verdict = stats.speed_verdict(ratio, across_runs=True)
        verdicts[verdict] += 1
        means = [numbers.significant(stats.geometric_mean(rounds).estimate) for rounds in (before, after)]
        rows.append([result.cell.study, result.cell.label(), *means, numbers.ratio(ratio), verdict])
    if not rows:
        raise UsageError(f"{first} and {second} have no measured latency of the same cell in common")
    head = ["study", "cell", "first ms", "second ms", "first / second", "second is"]
    counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
    return "\n".join([*_differences(a, b), _CAUTION, "", *_aligned([head, *rows]), "", f"{numbers.plural(len(rows), 'cell')}: {counts}."])


def _differences(a: Run, b: Run) -> list[str]:
    """One line per condition in which the runs differ."""
    ours, theirs = a.environment, b.environment
    pairs = [(name, ours.identity.get(name), theirs.identity.get(name)) for name in {**ours.identity, **theirs.identity}]
    pairs += [(name, ours.state.get(name), theirs.state.get(name)) for name in ("git_commit", "git_dirty")]
    return [f"{name}: {first} -> {second}" for name, first, second in pairs if first != second]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
