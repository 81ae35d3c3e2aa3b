"""All arms against the baseline at once: every arm tells the error of the differences, and a second interval covers all of them."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from emca_bench import stats
from emca_bench.report import figures, numbers
from emca_bench.report.accuracy import AccuracyGroup, Metric
from emca_bench.report.arms import label
from emca_bench.report.document import Block, Column, Figure, Paragraph, Table, Value
from emca_bench.report.tables import arm, star, starred
from emca_bench.stats import Joint

_SAID = """Here all arms together tell how far a difference scatters, as if every arm scattered alike; with few seeds that says more than
the pairs of one arm, by which the table above judges. The second interval and the verdict hold for all arms at once, so that the best of
many is not called better by luck alone."""
_CAPTION = "Differences to {}, best first. Thick: 95 % interval of each alone. Thin: of all at once. Grey band: within the margin."


def together_blocks(group: AccuracyGroup, palette: dict[str, figures.Look], name: str) -> list[Block]:
    """Figure and table; nothing where there are too few arms or seeds."""
    first = group.together.get(group.metric.key)
    if first is None:
        return []
    seeds = next(iter(first.values())).count
    order = sorted(first, key=lambda entry: -first[entry].estimate)
    caption = _CAPTION.format(label(str(group.baseline)))
    files = figures.files(differences(group, order, palette))
    return [
        Paragraph(f"{' '.join(_SAID.split())} From {numbers.plural(seeds, 'seed')} that all arms have."),
        Figure(f"together-{name}", f"Differences of all arms on {group.dataset}", caption, files),
        together_table(group, order),
    ]


def together_table(group: AccuracyGroup, order: Sequence[str]) -> Table:
    """Arms with both intervals of the metric that is judged, the verdict for all at once, and differences of the other metrics."""
    first, *others = _drawn(group)
    columns = [Column("Arm"), Column(f"{first.label} minus {group.baseline} [95 %]", "right"), Column("[95 %, all at once]", "right")]
    columns += [Column(f"Verdict for all at once (margin {group.study.margin:g})")]
    columns += [Column(f"{metric.label} [95 %]", "right") for metric in others]
    words = {name: _shown(group.together[first.key][name], group.study.margin) for name in order}
    rows = []
    for name, word in words.items():
        joint = group.together[first.key][name]
        all_at_once = joint.mean(joint.together)
        bounds = Value(numbers.interval(all_at_once.low, all_at_once.high, 2), sort=all_at_once.low)
        cells = [_difference(joint), bounds, starred(group, word)]
        rows.append([arm(name), *cells, *(_difference(group.together[metric.key][name]) for metric in others)])
    return Table(columns, rows, star(group, words.values()))


def differences(group: AccuracyGroup, order: Sequence[str], palette: dict[str, figures.Look]) -> Drawing:
    """A panel per drawn metric, a line per arm with both intervals."""
    metrics = _drawn(group)
    figure = figures.blank(figures.WIDTH if len(metrics) > 1 else figures.WIDTH * 0.8, 0.9 + 0.19 * len(order))
    panels: list[Axes] = list(figure.subplots(1, len(metrics), squeeze=False)[0])
    for ax, metric in zip(panels, metrics, strict=True):
        joints = group.together[metric.key]
        if metric == group.metric:
            ax.axvspan(-group.study.margin, group.study.margin, color="#DDDDDD", alpha=0.7, lw=0)
        ax.axvline(0, color=palette[str(group.baseline)].color, lw=1)
        for height, name in enumerate(order):
            _line(ax, height, joints[name], palette[name])
        ax.set_yticks(range(len(order)), [label(name) for name in order] if ax is panels[0] else [""] * len(order))
        ax.set_ylim(len(order) - 0.4, -0.6)
        ax.grid(False, axis="y")
        ax.set_xlabel(f"{metric.label} minus {label(str(group.baseline))}" if len(metrics) == 1 else f"{metric.label} (points)")
    panels[0].set_title(f"{group.label}: minus {label(str(group.baseline))}")
    return figure


def _line(ax: Axes, height: int, joint: Joint, look: figures.Look) -> None:
    for half, width in ((joint.together, 0.8), (joint.alone, 2.6)):
        ends = [joint.estimate - half, joint.estimate + half]
        ax.plot(ends, [height, height], color=look.color, lw=width, solid_capstyle="butt")
    ax.plot(joint.estimate, height, color=look.color, marker=look.marker, ms=5.5, mec="white", mew=0.5)


def _drawn(group: AccuracyGroup) -> list[Metric]:
    arms = group.together[group.metric.key].keys()
    return [metric for metric in group.metrics if metric.key in figures.DRAWN and group.together.get(metric.key, {}).keys() == arms]


def _difference(joint: Joint) -> Value:
    return Value(numbers.points(joint.mean(joint.alone), signed=True), sort=joint.estimate)


def _shown(joint: Joint, margin: float) -> str:
    if joint.estimate - joint.together > 0:
        return "better"
    return stats.non_inferiority(joint.mean(joint.together), margin)
