"""Results as tables of a document."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterable, Mapping, Sequence

from emca_bench.report import numbers
from emca_bench.report.accuracy import AccuracyGroup, ArmAccuracy
from emca_bench.report.claims import Claim
from emca_bench.report.counts import CountRow, component_label, components_of
from emca_bench.report.document import Code, Column, Strong, Table, Text, Tone, Value
from emca_bench.report.load import Result, distinct_cells
from emca_bench.report.numbers import NOTHING
from emca_bench.report.speed import SpeedGroup, SpeedRow, free_attention_bound
from emca_bench.specs import COST_SUFFIX, Cell, Study
from emca_bench.stats import Ratio, Sensitivity, speed_verdict

TONES: Mapping[str, Tone] = {
    "faster": "good",
    "slower": "bad",
    "no difference": "muted",
    "undecided": "open",
    "better": "good",
    "not worse": "good",
    "worse": "bad",
    "reproduced": "good",
    "differs": "bad",
    "not comparable": "open",
    "not run": "muted",
    "met": "good",
    "missed": "bad",
    "failed": "bad",
    "impossible": "open",
    "partial": "open",
    "can decide": "good",
    "cannot decide": "bad",
}
EMPTY = Value(NOTHING, tone="muted")
_BLIND = frozenset({"not worse", "better"})
"""Verdicts that the arm without cross-attention might have too, where the data cannot tell."""


def verdict(word: str) -> Value:
    """A verdict or status with its tone."""
    return Value(word, sort=word, tone=TONES.get(word, "plain"))


def claims_table(claims: Sequence[Claim]) -> Table:
    """The claims of the paper against this run."""
    columns = [Column("Claim", wide=True), Column("Against"), Column("Published", "right"), Column("Measured [95 %]", "right")]
    columns += [Column("Measured under"), Column("Verdict"), Column("Why", wide=True)]
    rows = []
    for claim in claims:
        measured = Value(claim.measured, sort=claim.estimate) if claim.measured else EMPTY
        against = Value(Code(claim.against)) if claim.against else EMPTY
        said = Value((claim.expected.claim, f" ({claim.expected.source})"), sort=claim.expected.claim)
        published = Value(claim.published, sort=claim.expected.value)
        rows.append([said, against, published, measured, Value(claim.conditions), verdict(claim.verdict), Value(claim.reason)])
    return Table(columns, rows)


def attention_table(group: SpeedGroup) -> Table:
    """Cross-attention alone: a row per number of pixels and arm."""
    columns = [Column("Pixels", "right"), Column("Arm"), Column("GMACs", "right"), Column("ms [95 %]", "right"), *speedup_columns(group)]
    mixed = len({backends(row) for row in group.rows if row.backends}) > 1
    columns += [Column("Peak MiB", "right"), *([Column("Backend")] if mixed else [])]
    rows = []
    ordered = sorted(group.rows, key=lambda row: row.pixels)
    for row in ordered:
        pixels = Value(f"{numbers.size(row.cell.params['pixels'])} = {row.pixels}", sort=row.pixels)
        memory = number(row.peak_memory_bytes, numbers.mebibytes)
        backend = [Value(backends(row) or NOTHING)] if mixed else []
        rows.append([pixels, arm(row.arm), number(row.macs, numbers.gmacs), latency(row), *speedups(group, row), memory, *backend])
    begins = frozenset(index for index in range(1, len(ordered)) if ordered[index].pixels != ordered[index - 1].pixels)
    return Table(columns, rows, not_interleaved([group]), breaks=begins)


def speed_table(groups: Sequence[SpeedGroup]) -> Table:
    """Decoder, model and end to end: a row per setting and arm of one study."""
    where = _varying([row.cell.params for group in groups for row in group.rows])
    columns = [
        *map(_where_column, where),
        Column("Arm"),
        Column("ms [95 %]", "right"),
        Column("FPS", "right"),
        *speedup_columns(groups[0]),
    ]
    metered = any(row.energy_j is not None for group in groups for row in group.rows)
    columns += [Column("J per image", "right")] if metered else []
    rows = []
    for group in groups:
        for row in group.rows:
            place = [_where(name, row.cell.params) for name in where]
            rate = number(row.frames_per_second, numbers.significant)
            energy = [number(row.energy_j, numbers.significant)] if metered else []
            rows.append([*place, arm(row.arm), latency(row), rate, *speedups(group, row), *energy])
    return Table(columns, rows, not_interleaved(groups), breaks=_starts(group.rows for group in groups))


def bounds_table(groups: Sequence[SpeedGroup]) -> Table | None:
    """What leaving the cross-attention out would give, per setting and baseline; None where no setting has that arm."""
    baselines = groups[0].study.baselines
    bounds = [(group, [free_attention_bound(group, name) for name in baselines]) for group in groups]
    bounds = [(group, found) for group, found in bounds if any(found)]
    if not bounds:
        return None
    where = _varying([group.rows[0].cell.params for group, _ in bounds])
    columns = [*map(_where_column, where), *(Column(f"Bound over {name}", "right") for name in baselines)]
    rows = []
    for group, found in bounds:
        shown = [Value(numbers.ratio(ratio), sort=ratio.estimate) if ratio else EMPTY for ratio in found]
        rows.append([*(_where(name, group.rows[0].cell.params) for name in where), *shown])
    return Table(columns, rows)


def counts_table(groups: Sequence[Sequence[CountRow]]) -> Table:
    """Multiply-adds by component for every model, size and arm."""
    every = [row for group in groups for row in group]
    components = components_of(every)
    where = _varying([row.cell.params for row in every])
    columns = [*map(_where_column, where), Column("Arm")]
    columns += [Column(component_label(name), "right", f"{name} in 1e9 multiply-adds") for name in components]
    columns += [Column("Total GMACs", "right"), Column("Share of cross-attention", "right"), Column("Params (M)", "right")]
    rows = []
    for row in every:
        parts = [number(row.components.get(name, 0) if row.components else None, numbers.gmacs) for name in components]
        total = number(row.macs, numbers.gmacs) if row.macs is not None else verdict(row.status)
        share = number(row.attention_share, lambda share: f"{share:.1%}")
        place = [_where(name, row.cell.params) for name in where]
        rows.append([*place, arm(row.arm), *parts, total, share, number(row.parameters, lambda count: f"{count / 1e6:.1f}")])
    return Table(columns, rows, breaks=_starts(groups))


def cross_check_table(rows: Iterable[CountRow]) -> Table:
    """Counter against closed form of the cross-attentions, and what the counter could not count."""
    columns = [Column("Arm"), Column("Conditions"), Column("Counted GMACs", "right"), Column("Closed form", "right")]
    columns += [Column("Difference", "right"), Column("Operators without a count")]
    shown = []
    for row in rows:
        if row.macs is None:
            continue
        apart = row.disagreement
        difference = (
            EMPTY if apart is None else Value(numbers.minus(f"{apart:+.2%}"), sort=apart, tone="good" if abs(apart) <= 0.01 else "bad")
        )
        left_out = ", ".join(f"{name} ({numbers.plural(calls, 'call')})" for name, calls in sorted(row.uncounted.items())) or "none"
        closed = number(row.closed_form_macs, numbers.gmacs)
        shown.append([arm(row.arm), _count_conditions(row), number(row.attention_macs, numbers.gmacs), closed, difference, Value(left_out)])
    return Table(columns, shown)


def counters_table(rows: Iterable[CountRow]) -> Table:
    """Torch's counter beside fvcore's rules, and the operators that lead from one to the other."""
    columns = [Column("Arm"), Column("Conditions"), Column("torch GMACs", "right"), Column("fvcore GMACs", "right")]
    columns += [Column("Only fvcore counts"), Column("Only torch counts")]
    shown = []
    for row in rows:
        if row.by_fvcore is None:
            continue
        apart = [_operators(row.by_fvcore.added), _operators(row.by_fvcore.dropped)]
        totals = [number(row.macs, numbers.gmacs), number(row.by_fvcore.macs, numbers.gmacs)]
        shown.append([arm(row.arm), _count_conditions(row), *totals, *apart])
    return Table(columns, shown)


def accuracy_table(group: AccuracyGroup) -> Table:
    """Arms by the metric that is judged, with the floors that give the numbers a meaning."""
    columns = [
        Column("Arm"),
        Column(f"{group.metric.label} ± 95 %", "right"),
        Column("Seeds", "right"),
        Column(f"Minus {group.baseline or 'baseline'}", "right"),
    ]
    columns += [Column(f"Verdict (margin {group.study.margin:g})"), Column("Pixel accuracy", "right"), Column("Parameters", "right")]
    rows = [_accuracy_row(group, entry) for entry in group.arms]
    frequency, pixels = group.fact("frequency_miou"), group.fact("frequency_pixel_accuracy")
    if frequency is not None:
        floor = [
            Value("always the commonest class", tone="muted"),
            Value(f"{frequency:.2f}", sort=frequency),
            EMPTY,
            EMPTY,
            Value("floor", tone="muted"),
        ]
        rows.append([*floor, number(pixels, lambda share: f"{share:.2f}"), EMPTY])
    return Table(columns, rows, star([entry.verdict for entry in group.arms], group.sensitivity))


def star(verdicts: Iterable[str | None], sensitivity: Sensitivity | None) -> str:
    """What the asterisk of `starred` means, where one of the verdicts has it."""
    found = sensitivity != "can decide" and not _BLIND.isdisjoint(verdicts)
    return "* Not shown to mean anything: leaving out the cross-attention may be not worse either." if found else ""


def starred(word: str, sensitivity: Sensitivity | None) -> Value:
    """A verdict on accuracy, with an asterisk where the data cannot carry it."""
    return Value(f"{word}*", tone="open") if word in _BLIND and sensitivity != "can decide" else verdict(word)


def arm_of(group: AccuracyGroup, name: str) -> Value:
    """The name of an arm, the floor marked."""
    return Value((Code(name), " (floor)") if name == group.floor else Code(name), sort=name)


def class_table(group: AccuracyGroup, name: str = "class_iou", *, left_out: bool = False) -> Table:
    """A value of every class, by default its IoU, a column per arm; classes that have none for any arm may be left out."""
    tables = {entry.name: entry.by_class(name) for entry in group.measured}
    names = dict.fromkeys(name for table in tables.values() for name in table)
    if left_out:
        names = {name: None for name in names if any(table.get(name) is not None for table in tables.values())}
    columns = [Column("Class"), *(Column(name, "right") for name in tables)]
    rows = []
    for name in names:
        found = [table.get(name) for table in tables.values()]
        best = max((value for value in found if value is not None), default=None)
        rows.append([Value(name), *(_class_value(value, best) for value in found)])
    return Table(columns, rows)


def training_table(group: AccuracyGroup) -> Table:
    """What was trained for how long."""
    columns = [
        Column("Arm"),
        Column("Seeds"),
        Column("Steps", "right"),
        Column("Epochs", "right"),
        Column("Training time per seed", "right"),
    ]
    fed = any(entry.average("loader_images_per_second") is not None for entry in group.measured)
    columns += _feed_columns() if fed else []
    shared = any((entry.average("cells_at_once") or 1) > 1 for entry in group.measured)
    columns += [Column("At once", "right", "trainings that shared the machine, and so its time")] if shared else []
    columns += [Column("Final loss", "right"), Column("Pretrained")]
    rows = []
    batch = float(group.shared.get("batch", 1))
    for entry in group.measured:
        steps, images = entry.average("train_steps"), entry.average("train_images")
        epochs = steps * batch / images if steps and images else None
        seeds = ", ".join(str(seed) for seed in entry.seeds)
        pretrained = next((str(result.values["pretrained"]) for result in entry.finished if result.values.get("pretrained")), "nothing")
        row = [arm(entry.name), Value(seeds), number(steps, lambda count: f"{count:.0f}"), number(epochs, numbers.significant)]
        row += [number(entry.average("train_seconds"), numbers.duration), *(_feed_cells(entry, batch) if fed else [])]
        row += [number(entry.average("cells_at_once"), numbers.significant)] if shared else []
        row.append(number(entry.average("final_loss"), numbers.significant))
        rows.append([*row, Value(pretrained)])
    return Table(columns, rows)


def _feed_columns() -> list[Column]:
    return [
        Column("Trains images/s", "right", "without the time that a step waited for its batch"),
        Column("Loader images/s", "right", "what all loader processes make if they never wait; above the column before, no step starves"),
        Column("Waiting for data", "right", "share of the training time"),
    ]


def _feed_cells(entry: ArmAccuracy, batch: float) -> list[Value]:
    steps, seconds, waiting = (entry.average(name) for name in ("train_steps", "train_seconds", "waiting_seconds"))
    if not steps or not seconds or waiting is None:
        return [EMPTY] * 3
    trained = steps * batch / max(seconds - waiting, 1e-9)
    share = waiting / seconds
    made = number(entry.average("loader_images_per_second"), numbers.significant)
    return [Value(numbers.significant(trained), sort=trained), made, Value(f"{share:.1%}", sort=share)]


def conditions_table(rows: Iterable[tuple[str, Text]]) -> Table:
    """Machine, versions and state, one per row."""
    return Table([Column("Condition"), Column("Value")], [[Value(name), Value(text)] for name, text in rows])


def trouble_table(results: Sequence[Result]) -> Table:
    """Planned cells without a full result."""
    columns = [Column("Study"), Column("Cell"), Column("Measure"), Column("Status"), Column("Reason", wide=True)]
    rows = []
    for result in results:
        reason = result.reason or ("no record" if result.status == "not run" else "")
        if result.status == "partial":
            reason = f"{len(result.done)} of {numbers.plural(result.planned_rounds, 'round')}" + (f": {reason}" if reason else "")
        cell = result.cell
        rows.append([Value(Code(cell.study)), Value(cell.label()), Value(result.measure), verdict(result.status), Value(reason)])
    return Table(columns, rows)


def commands_table(study: Study) -> Table:
    """The command that measures each cell of a study again."""
    rows = [[Value(cell.label()), Value(Code(command(study, cell)))] for cell in distinct_cells(study)]
    return Table([Column("Cell"), Column("Command")], rows)


def command(study: Study, cell: Cell) -> str:
    """The command line that measures one cell."""
    conditions = {"arm": cell.arm.name, **{name: cell.params[name] for name, values in study.axes.items() if len(values) > 1}}
    overridden = set(cell.arm.overrides)
    chosen = [f"--only {shlex.quote(f'{name}={value}')}" for name, value in conditions.items() if name not in overridden]
    device = ["--device cuda"] if cell.params.get("device") == "cuda" else []
    return " ".join(["emca-bench run", study.name.removesuffix(COST_SUFFIX), *(["--quick"] if study.quick else []), *chosen, *device])


def _starts(groups: Iterable[Sequence[object]]) -> frozenset[int]:
    """Index of the first row of every group but the first."""
    return frozenset(itertools.accumulate(map(len, groups)))


def _varying(params: Sequence[Mapping[str, object]]) -> list[str]:
    """Names that tell rows apart; the image size always."""
    names = ("scope", "model", "image_size", "batch", "dtype", "device", "queries", "classes", "layers")
    return [name for name in names if name == "image_size" or len({row.get(name) for row in params}) > 1]


def _where_column(name: str) -> Column:
    return Column({"image_size": "Images"}.get(name, name.capitalize()))


def _where(name: str, params: Mapping[str, object]) -> Value:
    value = params.get(name)
    if value is None:
        return EMPTY
    if name == "image_size":
        return Value(numbers.size(str(value)), sort=numbers.area(str(value)))
    if name == "model":
        return Value(Code(str(value)), sort=str(value))
    return Value(numbers.SCOPE_NAMES.get(str(value), str(value)), sort=value if isinstance(value, (int, float)) else str(value))


def arm(name: str) -> Value:
    """Name of an arm."""
    return Value(Code(name), sort=name)


def _count_conditions(row: CountRow) -> Value:
    names = ("scope", "model", "image_size", "pixels", "queries", "width", "batch")
    return Value(numbers.conditions({name: row.cell.params[name] for name in names if name in row.cell.params}))


def _operators(macs: Mapping[str, int]) -> Value:
    """Operators with their multiply-adds in 1e9."""
    return Value(", ".join(f"{name} {numbers.gmacs(count)}" for name, count in sorted(macs.items())) or "nothing")


def number(value: float | None, show: object) -> Value:
    """A number as a function shows it, or nothing."""
    assert callable(show)
    return EMPTY if value is None else Value(show(value), sort=float(value))


def latency(row: SpeedRow) -> Value:
    """Milliseconds of a call with their interval, or why there are none."""
    if row.latency_ms is None:
        return verdict(row.status)
    return Value(numbers.milliseconds(row.latency_ms), sort=row.latency_ms.estimate, tone="open" if row.status == "partial" else "plain")


def backends(row: SpeedRow) -> str:
    """Names of the backends that served a row, without their reasons."""
    return ", ".join(dict.fromkeys(name.split(" (")[0] for name in row.backends.values()))


def speedup_columns(group: SpeedGroup) -> list[Column]:
    """Two per baseline of the study: ratio and verdict."""
    return [column for name in group.study.baselines for column in (Column(f"vs {name}", "right"), Column("Verdict"))]


def not_interleaved(groups: Iterable[SpeedGroup]) -> str:
    """What the dagger of a ratio means, where there is one."""
    apart = any(not ratio.interleaved for group in groups for row in group.rows for ratio in row.speedups.values())
    return f"{numbers.APART} {numbers.NOT_INTERLEAVED}" if apart else ""


def speedups(group: SpeedGroup, row: SpeedRow) -> list[Value]:
    """What stands in those columns."""
    return [value for name in group.study.baselines for value in _speedup(row, name)]


def _speedup(row: SpeedRow, baseline: str) -> tuple[Value, Value]:
    if row.arm == baseline:
        return Value("1", sort=1.0, tone="muted"), Value("baseline", tone="muted")
    ratio: Ratio | None = row.speedups.get(baseline)
    if ratio is None:
        return EMPTY, EMPTY
    return Value(numbers.ratio(ratio), sort=ratio.estimate), verdict(speed_verdict(ratio))


def _accuracy_row(group: AccuracyGroup, entry: ArmAccuracy) -> list[Value]:
    pixel_accuracy = number(entry.average("pixel_accuracy"), lambda share: f"{share:.2f}")
    return [*judged_cells(group, entry), pixel_accuracy, number(entry.average("parameters"), lambda count: f"{count / 1e6:.2f} M")]


def judged_cells(group: AccuracyGroup, entry: ArmAccuracy) -> list[Value]:
    """Arm, score, seeds, difference to the baseline and verdict; the status in place of the score where there is none."""
    if entry.score is None:
        states = {result.status for result in entry.results.values()}
        state = next((word for word in ("failed", "impossible") if word in states), "not run")
        return [arm(entry.name), verdict(state), *[EMPTY] * 3]
    planned, count = len(entry.results), entry.score.count
    seeds = Value(f"{count}" if count == planned else f"{count} of {planned}", sort=count)
    difference = EMPTY if entry.difference is None else Value(numbers.points(entry.difference, signed=True), sort=entry.difference.estimate)
    judged = Value("baseline", tone="muted") if entry.name == group.baseline else EMPTY
    if entry.verdict is not None:
        judged = starred(entry.verdict, group.sensitivity)
    return [arm_of(group, entry.name), Value(numbers.points(entry.score), sort=entry.score.estimate), seeds, difference, judged]


def _class_value(value: float | None, best: float | None) -> Value:
    if value is None:
        return Value("absent", tone="muted")
    text = f"{value:.1f}"
    return Value(Strong(text) if value == best and value > 0 else text, sort=value)
