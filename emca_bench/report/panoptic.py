"""Tables and sentences of groups that were trained for panoptic segmentation."""

from __future__ import annotations

from emca_bench.report import numbers
from emca_bench.report.accuracy import AccuracyGroup, ArmAccuracy, Metric
from emca_bench.report.document import Block, Column, Details, Paragraph, Table, Value
from emca_bench.report.tables import EMPTY, arm, class_table, judged_cells, number, star

PUBLISHED_THRESHOLD = 0.8
"""What object and overlap thresholds are where a study sets none, as Mask2Former published them."""

_MEANS = {"sq": "SQ", "rq": "RQ", "ap50": "AP50", "ap75": "AP75"}


def panoptic_table(group: AccuracyGroup) -> Table:
    """Arms by PQ, and what else the same weights give."""
    first, *others = group.metrics
    columns = [Column("Arm"), Column(f"{first.label} ± 95 %", "right"), Column("Seeds", "right")]
    columns += [Column(f"Minus {group.baseline or 'baseline'}", "right"), Column(f"Verdict (margin {group.study.margin:g})")]
    columns += [Column(metric.label, "right") for metric in others]
    columns += [*(Column(title, "right") for title in _MEANS.values()), Column("Parameters", "right")]
    rows = []
    for entry in group.arms:
        means = [_mean(entry, metric) for metric in others]
        means += [number(entry.average(name), lambda value: f"{value:.1f}") for name in _MEANS]
        rows.append([*judged_cells(group, entry), *means, number(entry.average("parameters"), lambda count: f"{count / 1e6:.2f} M")])
    notes = star([entry.verdict for entry in group.arms], group.sensitivity), conditions(group)
    return Table(columns, rows, " ".join(note for note in notes if note))


def differences_table(group: AccuracyGroup) -> Table | None:
    """Every metric minus the baseline's, paired over seeds; None where no arm can be compared."""
    compared = [entry for entry in group.arms if entry.differences]
    if not compared:
        return None
    columns = [Column("Arm"), *(Column(f"{metric.label} [95 %]", "right") for metric in group.metrics)]
    rows = [[arm(entry.name), *(_difference(entry, metric) for metric in group.metrics)] for entry in compared]
    return Table(columns, rows, f"Minus {group.baseline}, paired over common seeds. {conditions(group)}")


def panoptic_details(group: AccuracyGroup) -> list[Block]:
    """Differences and classes, folded away."""
    differences = differences_table(group)
    blocks: list[Block] = [] if differences is None else [Details("Every metric against the baseline", [differences])]
    blocks.append(Details("PQ of every class", [class_table(group, "class_pq")]))
    return [*blocks, Details("AP of every thing", [class_table(group, "class_ap", left_out=True)])]


def conditions(group: AccuracyGroup) -> str:
    """Thresholds and sizes in one line, for captions."""
    objects, overlap = _thresholds(group)
    size = numbers.size(group.fact("image_size") or group.shared.get("image_size", "?"))
    return f"Object threshold {objects:g}, overlap threshold {overlap:g}; trained on crops of {size}, scored at the images' own size."


def rules(group: AccuracyGroup) -> Paragraph:
    """How predictions became segments and instances."""
    objects, overlap = _thresholds(group)
    as_published = objects == overlap == PUBLISHED_THRESHOLD
    published = "" if as_published else f" (published: {PUBLISHED_THRESHOLD:g} and {PUBLISHED_THRESHOLD:.0%})"
    return Paragraph(
        f"One set of weights gives all columns. A panoptic segment needs a class score above {objects:g} and keeps at least {overlap:.0%} "
        f"of its mask{published}; instances are the 100 best pairs of query and class."
    )


def shown_rule(group: AccuracyGroup) -> str:
    """Which results an overlay shows."""
    objects, overlap = _thresholds(group)
    kept = f"Segments: class score above {objects:g}, at least {overlap:.0%} of the mask kept. Instances: score of at least {objects:g}"
    return f"{kept}, better ones on top. White: edges of segments. Results at the images' own size."


def _thresholds(group: AccuracyGroup) -> tuple[float, float]:
    objects, overlap = (float(group.shared.get(name, PUBLISHED_THRESHOLD)) for name in ("object_threshold", "overlap_threshold"))
    return objects, overlap


def _mean(entry: ArmAccuracy, metric: Metric) -> Value:
    mean = entry.means.get(metric.key)
    return EMPTY if mean is None else Value(numbers.points(mean), sort=mean.estimate)


def _difference(entry: ArmAccuracy, metric: Metric) -> Value:
    mean = entry.differences.get(metric.key)
    return EMPTY if mean is None else Value(numbers.points(mean, signed=True), sort=mean.estimate)
