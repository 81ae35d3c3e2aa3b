"""The section on operators: a table and a roofline per study, and the targets that were set."""

from __future__ import annotations

from collections.abc import Sequence

from emca_bench.report import figures, numbers, tables
from emca_bench.report.document import Block, Code, Column, Figure, Heading, Paragraph, Strong, Table, Value
from emca_bench.report.findings import Findings
from emca_bench.report.kernels import KernelGroup, flops_rate, intensity, traffic_rate
from emca_bench.report.roofline import roofline
from emca_bench.report.speed import SpeedRow
from emca_bench.report.targets import Judged

_BOUND = """Bound: the least time of the work at the ceilings, that of the floating-point operations or that of the least traffic, whichever
is longer. Least traffic: every argument read once and every result written once."""
_CAPTION = """Larger markers: more pixels; percentages: share of the bound at the most pixels. The roof is what this machine did in the
same rounds: {ceilings}."""
CEILING_WORDS = {
    "burst": "multiply-adds in registers",
    "matmul": "a large matrix product",
    "copy": "a large copy, reads and writes counted",
    "read": "a large sum",
}


def target_blocks(found: Findings) -> list[Block]:
    """The targets and their verdicts; nothing where a run has none."""
    if not found.targets:
        return []
    return [
        Heading(2, "Targets"),
        targets_table(found.targets),
        Paragraph(
            "Met and missed need the whole 95 % interval on one side of the target; undecided: the target lies within it, or there were "
            "too few rounds. Counts of memory have no interval."
        ),
    ]


def targets_table(rows: Sequence[Judged]) -> Table:
    """One row per target, rival and setting."""
    columns = [Column("Target", wide=True), Column("Against"), Column("Asked", "right"), Column("Measured [95 %]", "right")]
    columns += [Column("Measured under"), Column("Verdict"), Column("Why", wide=True)]
    shown = []
    for row in rows:
        measured = Value(row.measured, sort=row.found.estimate) if row.found else tables.EMPTY
        against = Value(Code(row.against)) if row.against else tables.EMPTY
        asked = Value(row.asked, sort=row.target.at_least or row.target.at_most)
        words = [Value(row.conditions), tables.verdict(row.verdict), Value(row.reason)]
        shown.append([Value(row.target.target), against, asked, measured, *words])
    begins = frozenset(index for index in range(1, len(rows)) if rows[index].target != rows[index - 1].target)
    return Table(columns, shown, breaks=begins)


def operator_blocks(found: Findings, palette: dict[str, figures.Look]) -> list[Block]:
    """Every study of operators; nothing where a run has none."""
    blocks: list[Block] = [Heading(2, "Operators")] if found.kernels else []
    for groups in found.kernels:
        if not groups:
            continue
        study = groups[0].group.study
        shared = {name: value for name, value in groups[0].group.shared.items() if all(g.group.shared.get(name) == value for g in groups)}
        blocks += [Heading(3, study.title), Paragraph((Strong(study.question), f" Conditions: {numbers.conditions(shared)}."))]
        drawn = roofline(groups, palette)
        if drawn is not None:
            caption = " ".join(_CAPTION.format(ceilings=_ceilings(groups)).split())
            blocks.append(Figure(f"roofline-{study.name}", f"Roofline of {study.title.lower()}", caption, figures.files(drawn)))
        blocks.append(operator_table(groups))
        if drawn is not None:
            blocks.append(Paragraph(" ".join(_BOUND.split())))
    return blocks


def _ceilings(groups: Sequence[KernelGroup]) -> str:
    names = {ceiling.name: None for group in groups for ceiling in (group.compute, group.memory) if ceiling}
    return "; ".join(f"{name}, {CEILING_WORDS[name]}" for name in names)


def operator_table(groups: Sequence[KernelGroup]) -> Table:
    """Time, rates and share of the bound: a row per setting, number of pixels and arm of one study."""
    varying = [
        name for name in ("dtype", "pass", "op") if len({row.cell.params.get(name) for group in groups for row in group.group.rows}) > 1
    ]
    bounded = any(group.bound_ms(row) is not None for group in groups for row in group.group.rows)
    columns = [Column("Pixels", "right"), *(Column(name.capitalize()) for name in varying), Column("Arm"), Column("ms [95 %]", "right")]
    columns += tables.speedup_columns(groups[0].group)
    if bounded:
        columns += [Column("GFLOP/s", "right"), Column("GB/s", "right", "of the least traffic"), Column("FLOP/byte", "right")]
        columns += [Column("Share of bound", "right"), Column("Bound by")]
    columns += [Column("Peak MiB", "right"), Column("Backend")]
    rows: list[list[Value]] = []
    begins = set()
    for group in groups:
        ordered = sorted(group.group.rows, key=lambda row: row.pixels)
        for index, row in enumerate(ordered):
            if rows and (index == 0 or row.pixels != ordered[index - 1].pixels):
                begins.add(len(rows))
            rows.append([*_place(row, varying), tables.arm(row.arm), tables.latency(row), *tables.speedups(group.group, row)])
            rows[-1] += [*(_rates(group, row) if bounded else []), tables.number(row.peak_memory_bytes, numbers.mebibytes)]
            rows[-1].append(Value(tables.backends(row) or numbers.NOTHING))
    return Table(columns, rows, tables.not_interleaved(group.group for group in groups), breaks=frozenset(begins))


def _place(row: SpeedRow, varying: Sequence[str]) -> list[Value]:
    pixels = Value(f"{numbers.size(row.cell.params['pixels'])} = {row.pixels}", sort=row.pixels)
    return [pixels, *(Value(numbers.conditions({name: row.cell.params[name]})) for name in varying)]


def _rates(group: KernelGroup, row: SpeedRow) -> list[Value]:
    limit = group.limit(row)
    return [
        tables.number(flops_rate(row), lambda rate: numbers.significant(rate / 1e9)),
        tables.number(traffic_rate(row), lambda rate: numbers.significant(rate / 1e9)),
        tables.number(intensity(row), numbers.significant),
        tables.number(group.reached(row), numbers.share),
        Value(limit) if limit else tables.EMPTY,
    ]
