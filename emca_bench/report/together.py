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
from emca_bench.report.tables import EMPTY, arm_of, star, starred
from emca_bench.stats import Joint, JointDifferences, Mean, Sensitivity

_SAID = """Here all arms together tell how far a difference scatters, as if every arm scattered alike; with few seeds that says more
than the pairs of one arm. The second interval and the verdict hold for all arms at once, so that the best of many is seldom called better
by luck. The table above, the first paragraph of this report and what it recommends go by the pairs."""
_TELLS = {
    "can decide": "By this error, {} can tell cross-attentions apart.",
    "cannot decide": "By this error, {} cannot tell cross-attentions apart.",
    "undecided": "By this error, {} is not shown to tell cross-attentions apart.",
}
_CAPTION = "Differences to {}, best first. Thick: 95 % interval of each alone. Thin: of all at once. Grey band: within the margin."
_SCATTER = "Scatter: standard deviation of an arm around its mean and the effect of the seed, in points; baseline {}, all arms together {}."
_UNEVEN = f"Above {stats.UNEVEN:g} times that of all, in the arm or the baseline, nothing is decided."


def together_blocks(group: AccuracyGroup, palette: dict[str, figures.Look], name: str) -> list[Block]:
    """Figure and table; nothing where there are too few arms or seeds."""
    found = group.together.get(group.metric.key)
    if found is None:
        return []
    order = sorted(found.arms, key=lambda entry: -found.arms[entry].estimate)
    caption = _CAPTION.format(label(str(group.baseline)))
    files = figures.files(differences(group, order, palette))
    return [
        Paragraph(" ".join([*_SAID.split(), *_compared(group, found)])),
        Figure(f"together-{name}", f"Differences of all arms on {group.dataset}", caption, files),
        together_table(group, order),
    ]


def _compared(group: AccuracyGroup, found: JointDifferences) -> list[str]:
    """From how many seeds, what that says of the data, and which arms are left out."""
    counts = sorted({joint.count for joint in found.arms.values()})
    said = [f"From {numbers.plural(counts[-1], 'seed')} an arm." if len(counts) == 1 else f"From {counts[0]} to {counts[-1]} seeds an arm."]
    blind = sensitivity(group)
    said += [] if blind is None else [_TELLS[blind].format(group.dataset)]
    missing = [label(entry.name) for entry in group.arms if entry.name not in found.scatter]
    if missing:
        said.append(f"Left out, with fewer than {stats.MIN_SEEDS} seeds that the baseline has too: {', '.join(missing)}.")
    return said


def together_table(group: AccuracyGroup, order: Sequence[str]) -> Table:
    """Arms with both intervals of the metric that is judged, the verdict for all at once, and differences of the other metrics."""
    first, *others = _drawn(group)
    found, blind = group.together[first.key], sensitivity(group)
    columns = [Column("Arm"), Column(f"{first.label} minus {group.baseline} [95 %, error of all arms]", "right")]
    columns += [Column("[95 %, all at once]", "right"), Column(f"Verdict for all at once (margin {group.study.margin:g})")]
    columns += [Column("Scatter", "right"), *(Column(f"{metric.label} [95 %]", "right") for metric in others)]
    words = {name: stats.joint_verdict(found, name, group.study.margin) for name in order}
    rows = []
    for name, word in words.items():
        joint = found.arms[name]
        all_at_once = joint.mean(joint.together)
        bounds = Value(numbers.interval(all_at_once.low, all_at_once.high, 2), sort=all_at_once.low)
        scatter = Value(f"{found.scatter[name]:.2f}", sort=found.scatter[name])
        cells = [_difference(joint), bounds, starred(word, blind), scatter]
        rows.append([arm_of(group, name), *cells, *(_difference(group.together[metric.key].arms.get(name)) for metric in others)])
    pooled = _SCATTER.format(f"{found.scatter[found.baseline]:.2f}", f"{found.pooled:.2f}")
    return Table(columns, rows, " ".join(said for said in (star(words.values(), blind), pooled, _UNEVEN) if said))


def sensitivity(group: AccuracyGroup) -> Sensitivity | None:
    """Whether the data can rank cross-attentions, by the error that all arms tell; None without the floor."""
    floor = group.together[group.metric.key].arms.get(str(group.floor))
    if floor is None:
        return None
    lost = -floor.estimate
    return stats.sensitivity(Mean(lost, lost - floor.alone, lost + floor.alone, floor.count), group.study.margin)


def differences(group: AccuracyGroup, order: Sequence[str], palette: dict[str, figures.Look]) -> Drawing:
    """A panel per drawn metric, a line per arm with both intervals."""
    metrics = _drawn(group)
    figure = figures.blank(figures.WIDTH if len(metrics) > 1 else figures.WIDTH * 0.8, 0.9 + 0.19 * len(order))
    panels: list[Axes] = list(figure.subplots(1, len(metrics), squeeze=False)[0])
    for ax, metric in zip(panels, metrics, strict=True):
        if metric == group.metric:
            ax.axvspan(-group.study.margin, group.study.margin, color="#DDDDDD", alpha=0.7, lw=0)
        ax.axvline(0, color=palette[str(group.baseline)].color, lw=1)
        for height, name in enumerate(order):
            _line(ax, height, group.together[metric.key].arms.get(name), palette[name])
        ax.set_yticks(range(len(order)), [label(name) for name in order] if ax is panels[0] else [""] * len(order))
        ax.set_ylim(len(order) - 0.4, -0.6)
        ax.grid(False, axis="y")
        ax.set_xlabel(f"{metric.label} minus {label(str(group.baseline))}" if len(metrics) == 1 else f"{metric.label} (points)")
    panels[0].set_title(f"{group.label}: minus {label(str(group.baseline))}")
    return figure


def _line(ax: Axes, height: int, joint: Joint | None, look: figures.Look) -> None:
    if joint is None:
        return
    for half, width in ((joint.together, 0.8), (joint.alone, 2.6)):
        ends = [joint.estimate - half, joint.estimate + half]
        ax.plot(ends, [height, height], color=look.color, lw=width, solid_capstyle="butt")
    ax.plot(joint.estimate, height, color=look.color, marker=look.marker, ms=5.5, mec="white", mew=0.5)


def _drawn(group: AccuracyGroup) -> list[Metric]:
    return [metric for metric in group.metrics if metric.key in figures.DRAWN and metric.key in group.together]


def _difference(joint: Joint | None) -> Value:
    return EMPTY if joint is None else Value(numbers.points(joint.mean(joint.alone), signed=True), sort=joint.estimate)
