"""Generated blocks of a README: text between markers, and the small table of headline numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from emca_bench.errors import UsageError, did_you_mean, listing
from emca_bench.records import write_atomically
from emca_bench.report import numbers
from emca_bench.report.accuracy import AccuracyGroup, accuracy_groups
from emca_bench.report.arms import label
from emca_bench.report.document import Code, Column, Table, Value
from emca_bench.report.load import Run, load_run
from emca_bench.report.markdown import escape, inline, table
from emca_bench.report.numbers import NOTHING
from emca_bench.report.speed import SpeedGroup, SpeedRow, attention_groups, largest
from emca_bench.stats import speed_verdict

HEADLINE = "headline"
"""Name of the block that holds the headline table."""
ROWS = ("masked", "masked_fused", "emca_as_written", "emca", "emca_soft", "soft_feature_heads", "mask_pooling", "mask_pooling_raw", "none")
"""Arms of the headline table, in its order, where they exist."""

_MARKER = re.compile(r"^<!-- emca:(begin|end) ([A-Za-z0-9_-]+) -->[ \t]*$", re.MULTILINE)


def update_blocks(text: str, blocks: Mapping[str, str]) -> str:
    """Replace the text between `<!-- emca:begin NAME -->` and `<!-- emca:end NAME -->`.

    Args:
        text: the whole file.
        blocks: content by name.

    Raises:
        UsageError: a marker of an unknown name, a block without its markers, or markers that do not pair up.
    """
    parts: list[str] = []
    opened: str | None = None
    position = 0
    seen: set[str] = set()
    for marker in _MARKER.finditer(text):
        kind, name = marker.groups()
        line = text.count("\n", 0, marker.start()) + 1
        if name not in blocks:
            raise UsageError(f"line {line}: unknown block {name!r}{did_you_mean(name, blocks)}; known: {listing(blocks)}")
        if kind == "begin":
            if opened is not None:
                raise UsageError(f"line {line}: block {name!r} begins inside of {opened!r}")
            if name in seen:
                raise UsageError(f"line {line}: block {name!r} stands here a second time")
            parts += [text[position : marker.end()], "\n", blocks[name].strip("\n"), "\n"]
            opened = name
            seen.add(name)
        else:
            if opened != name:
                raise UsageError(f"line {line}: block {name!r} ends where {f'{opened!r} is open' if opened else 'none is open'}")
            position = marker.start()
            opened = None
    if opened is not None:
        raise UsageError(f"block {opened!r} is never closed; expected <!-- emca:end {opened} -->")
    absent = set(blocks) - seen
    if absent:
        raise UsageError(f"no markers for {listing(absent)}; expected <!-- emca:begin NAME --> and <!-- emca:end NAME -->")
    return "".join(parts) + text[position:]


def updated_readme(path: Path, run_dir: Path, accuracy_dir: Path | None = None) -> str:
    """The text of a README with its headline block made anew from a run folder; writes nothing.

    Args:
        path: of the README.
        run_dir: the run folder.
        accuracy_dir: another one, that accuracies are taken from.

    Raises:
        UsageError: no such file, markers that do not pair up or are unknown, or no run folder.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    try:
        return update_blocks(text, {HEADLINE: readme_block(load_run(run_dir), load_run(accuracy_dir) if accuracy_dir else None)})
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def update_readme(path: Path, run_dir: Path, accuracy_dir: Path | None = None) -> None:
    """Write the headline block of a README, between `<!-- emca:begin headline -->` and `<!-- emca:end headline -->`.

    Raises:
        UsageError: as `updated_readme`; the file is left as it was.
    """
    write_atomically(path, updated_readme(path, run_dir, accuracy_dir))


def readme_block(run: Run, trained: Run | None = None) -> str:
    """The headline table as Markdown, with the conditions it holds under in one line; accuracies from `trained` where it is given."""
    group = next((group for group in attention_groups(run) if any(row.latency_ms for row in group.rows)), None)
    accuracy = [entry for entry in accuracy_groups(trained or run) if entry.measured][:2]
    if group is None and not accuracy:
        return "Nothing has been measured yet."
    columns = [Column("Cross-attention")]
    columns += _speed_columns(group) if group else []
    columns += [Column(f"{entry.metric.label} on {entry.dataset}", "right") for entry in accuracy]
    measured = {row.arm for row in group.rows if row.latency_ms} if group else set()
    measured |= {entry.name for one in accuracy for entry in one.measured}
    most = max((row.pixels for row in group.rows if row.latency_ms), default=0) if group else 0
    rows = []
    for name in ROWS:
        if name in measured:
            cells = _speed_cells(group, name, most) if group else []
            rows.append([Value(label(name)), *cells, *(_accuracy_cell(entry, name) for entry in accuracy)])
    return f"{table(Table(columns, rows))}\n\n{_conditions(run, group, accuracy, trained)}"


def _speed_columns(group: SpeedGroup) -> list[Column]:
    return [
        Column("GMACs", "right"),
        Column("ms [95 %]", "right"),
        *(Column(f"vs {label(name)}", "right") for name in group.study.baselines),
    ]


def _speed_cells(group: SpeedGroup, name: str, pixels: int) -> list[Value]:
    row: SpeedRow | None = largest(group, name)
    if row is None or row.pixels != pixels or row.latency_ms is None:
        return [Value(NOTHING)] * (2 + len(group.study.baselines))
    macs = NOTHING if row.macs is None else numbers.gmacs(row.macs)
    return [Value(macs), Value(numbers.milliseconds(row.latency_ms)), *(_speedup(row, base) for base in group.study.baselines)]


def _speedup(row: SpeedRow, baseline: str) -> Value:
    ratio = row.speedups.get(baseline)
    if ratio is None:
        return Value("1" if row.arm == baseline else NOTHING)
    judged = speed_verdict(ratio)
    return Value(numbers.ratio(ratio) + ("" if judged in ("faster", "slower") else f" ({judged})"))


def _accuracy_cell(group: AccuracyGroup, name: str) -> Value:
    entry = group.arm(name)
    return Value(NOTHING if entry is None or entry.score is None else numbers.points(entry.score))


def _conditions(run: Run, group: SpeedGroup | None, accuracy: list[AccuracyGroup], trained: Run | None) -> str:
    identity = run.environment.identity
    machine = [str(identity[name]) for name in ("gpu", "cpu") if identity.get(name)]
    machine += [numbers.plural(int(identity["threads"]), "thread")] if identity.get("threads") else []
    versions = [f"{name} {identity[name]}" for name in ("torch", "python") if identity.get(name)]
    parts = [", ".join(machine), ", ".join(versions)]
    if group is not None:
        most = max(group.rows, key=lambda row: row.pixels if row.latency_ms else 0).cell.params
        names = ("pixels", "queries", "width", "batch", "dtype", "device")
        parts.append(f"one call at {numbers.conditions({name: most[name] for name in names if name in most})}")
        parts.append(f"{group.study.settings.rounds} interleaved rounds")
    for entry in accuracy:
        doubt = "" if entry.sensitivity == "can decide" else " (this data set cannot rank cross-attentions)"
        doubt = " (whether it can rank cross-attentions is undecided)" if entry.sensitivity in (None, "undecided") else doubt
        seeds = max(len(arm.seeds) for arm in entry.measured)
        parts.append(
            f"{entry.label}: {numbers.plural(int(entry.fact('train_steps') or 0), 'step')}, {numbers.plural(seeds, 'seed')}{doubt}"
        )
    quick = ["quick run, not to be cited"] if run.quick else []
    text = "; ".join(part for part in [*quick, *parts] if part)
    sources = [f"Command: {inline(Code(command))}" for command in run.environment.commands]
    if trained is not None and trained.environment.commands:
        source = trained.environment.identity.get("source", NOTHING)
        commands = ", ".join(inline(Code(command)) for command in trained.environment.commands)
        sources.append(f"accuracies: {commands}, source {source}")
    return f"{escape(text)}. {'; '.join(sources)}".strip()
