"""Figures of the report. With `roofline` and `together` the only importer of seaborn and matplotlib; the same data gives the same bytes."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import matplotlib.patheffects
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from emca_bench import stats
from emca_bench.report import numbers
from emca_bench.report.accuracy import AccuracyGroup, ArmAccuracy, Metric
from emca_bench.report.arms import in_reading_order, label
from emca_bench.report.counts import CountRow, component_label, components_of
from emca_bench.report.findings import TradeOff
from emca_bench.report.placement import Box, place
from emca_bench.report.speed import SpeedGroup, SpeedRow, crossing, first_baseline, without_attention
from emca_bench.stats import Mean

DPI = 200
WIDTH = 7.2
"""Inches: two columns of a paper."""

_LOOKS = {
    "masked": ("#8C8C8C", "o", "-"),
    "masked_fused": ("#1A1A1A", "s", "-"),
    "masked_features": ("#7570B3", "p", "-."),
    "emca_as_written": ("#E69F00", "^", "--"),
    "emca": ("#D55E00", "D", "-"),
    "emca_features": ("#882255", "*", "-."),
    "emca_soft": ("#0072B2", "v", "-"),
    "mask_pooling": ("#009E73", "P", "-"),
    "pem_ca": ("#CC79A7", "X", "-"),
    "pem_ca_published": ("#CC79A7", "X", "--"),
    "pem_ca_mended": ("#AA3377", "x", "-"),
    "none": ("#56B4E9", "h", ":"),
    "eager": ("#8C8C8C", "o", "-"),
    "scores_only": ("#1A1A1A", "s", "--"),
    "native": ("#D55E00", "D", "-"),
    "triton": ("#0072B2", "v", "-"),
    "cuda": ("#009E73", "P", "-"),
}
_SPARE_COLORS = ("#332288", "#999933", "#44AA99", "#AA4499", "#117733", "#661100", "#6699CC")
_SPARE_MARKERS = ("<", ">", "d", "8", "H")
_COMPONENT_COLORS = {
    "backbone": "#BBBBBB",
    "pixel_decoder": "#DDCC77",
    "input_projection": "#AA7744",
    "cross_attention": "#CC3311",
    "self_attention": "#88CCEE",
    "ffn": "#4477AA",
    "mask_heads": "#228833",
    "other": "#777777",
}


DRAWN = ("pq", "ap", "miou")
"""Metrics that have a panel; the others stand in tables."""
_MARKS = "dots: seeds, bar: mean with 95 % interval"


@dataclass(frozen=True)
class Look:
    """How an arm is drawn in every figure."""

    color: str
    marker: str
    dash: str


def looks(arms: Iterable[str]) -> dict[str, Look]:
    """Colours, markers and dashes that tell arms apart, also in grey and for the colour-blind."""
    found = {}
    spare = 0
    for name in in_reading_order(arms):
        if name in _LOOKS:
            found[name] = Look(*_LOOKS[name])
        else:
            found[name] = Look(_SPARE_COLORS[spare % len(_SPARE_COLORS)], _SPARE_MARKERS[spare % len(_SPARE_MARKERS)], "-.")
            spare += 1
    return found


@contextmanager
def style() -> Iterator[None]:
    """Settings under which every figure is made and saved."""
    own: dict[str, Any] = {
        "svg.hashsalt": "emca-bench",
        "svg.fonttype": "path",
        "font.family": "DejaVu Sans",
        "font.size": 8,
        "axes.titlesize": 8.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 8,
        "xtick.labelsize": 7.5,
        "ytick.labelsize": 7.5,
        "xtick.major.pad": 2,
        "ytick.major.pad": 2,
        "legend.fontsize": 7.5,
        "axes.edgecolor": "#555555",
        "axes.linewidth": 0.7,
        "grid.color": "#E4E4E4",
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.6,
        "lines.markersize": 4.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
    }
    settings: dict[Any, Any] = {**sns.plotting_context("paper"), **sns.axes_style("whitegrid"), **own}
    with mpl.rc_context(settings):
        yield


def files(figure: Figure) -> dict[str, bytes]:
    """The figure as SVG and as PNG at 200 dpi, free of dates and version names."""
    settle(figure)
    svg, png = io.BytesIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    figure.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
    return {"svg": svg.getvalue(), "png": png.getvalue()}


def latency_over_pixels(group: SpeedGroup, palette: dict[str, Look], subject: str | None) -> Figure:
    """Latency of one cross-attention against the number of pixels, and the speedup over the strongest baseline.

    The crossing of the subject with each baseline is marked where there is one.
    """
    figure = blank(WIDTH, 3.5)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1])
    _latency_panel(left, group, palette, subject)
    reference = group.study.baselines[-1] if group.study.baselines else None
    if reference is None or not _speedup_panel(right, group, palette, reference):
        right.remove()
    return figure


def macs_by_component(groups: Sequence[Sequence[CountRow]]) -> Figure:
    """Stacked bars of multiply-adds, a panel per model and image size."""
    shown = [[row for row in group if row.macs] for group in groups]
    shown = [group for group in shown if group]
    components = components_of([row for group in shown for row in group])
    figure = blank(WIDTH, 0)
    for ax, group in zip(_panels(figure, [[row.arm for row in group] for group in shown], columns=2, extra=0.35), shown, strict=True):
        _bars_panel(ax, group, components)
    handles = [mpl.patches.Patch(color=_component_color(name, components), label=component_label(name)) for name in components]
    lines = math.ceil(len(handles) / 7)
    columns = math.ceil(len(handles) / lines)
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, handlelength=1.2, columnspacing=1.2)
    return figure


def latency_by_scope(groups: Sequence[SpeedGroup], palette: dict[str, Look]) -> Figure:
    """Latency of decoder, model and end to end with intervals, a panel per setting; dashed: no cross-attention at all."""
    shown = [group for group in groups if any(row.latency_ms for row in group.rows)]
    sizes = len({group.shared.get("image_size") for group in shown})
    figure = blank(WIDTH, 0)
    arms = [[row.arm for row in group.rows if row.latency_ms] for group in shown]
    titled = [name for name in ("scope", "model", "image_size") if name != "model" or len({group.shared.get(name) for group in shown}) > 1]
    for ax, group in zip(_panels(figure, arms, columns=3 if sizes == 3 else 2), shown, strict=True):
        _scope_panel(ax, group, palette, titled)
    return figure


def accuracy_by_arm(group: AccuracyGroup, palette: dict[str, Look]) -> Figure:
    """Every drawn metric of every arm: seeds as dots, mean with interval, the floors, and the margin of the metric that is judged."""
    arms, metrics = group.measured, [metric for metric in group.metrics if metric.key in DRAWN]
    several = len(metrics) > 1
    figure = blank(WIDTH if several else WIDTH * 0.8, 0)
    panels = _panels(figure, [[entry.name for entry in arms]] * len(metrics), columns=3, extra=0.35 + 0.06 * len(arms))
    for ax, metric in zip(panels, metrics, strict=True):
        _margin_and_floor(ax, group, metric, palette)
        for height, entry in enumerate(arms):
            _accuracy_row(ax, height, entry, metric, palette[entry.name])
        if several:
            _at_least_a_point(ax)
        ax.set_xlabel(f"{metric.label} (points)" if several else f"{metric.label} (points); {_MARKS}")
    panels[0].set_title(group.label)
    if panels[0].get_legend_handles_labels()[0]:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _at_least_a_point(ax: Axes) -> None:
    """Widen the axis of a panel to one point, without much below zero: less would magnify noise."""
    low, high = ax.get_xlim()
    if high - low < 1:
        start = max((low + high - 1) / 2, -0.06)
        ax.set_xlim(start, start + 1)


def _margin_and_floor(ax: Axes, group: AccuracyGroup, metric: Metric, palette: dict[str, Look]) -> None:
    baseline, floor = group.arm(group.baseline), group.arm(group.floor)
    if baseline is not None and baseline.score is not None and metric == group.metric:
        top, margin = baseline.score.estimate, group.study.margin
        said = f"margin: {margin:g} below {label(baseline.name)}"
        ax.axvspan(top - margin, top, color="#DDDDDD", alpha=0.7, lw=0, label=said)
    if floor is not None and metric.key in floor.means:
        lowest = floor.means[metric.key].estimate
        ax.axvline(lowest, color=palette[floor.name].color, ls=":", lw=1.4, label="floor: no cross-attention")


def loss_curves(group: AccuracyGroup, palette: dict[str, Look]) -> Figure | None:
    """Training loss over steps: thin lines are seeds, the bold line their mean; None where nothing was recorded."""
    arms = [entry for entry in group.measured if entry.curves()]
    if not arms:
        return None
    figure = blank(WIDTH * 0.8, 3.0)
    ax = figure.subplots()
    ends = []
    for entry in arms:
        look = palette[entry.name]
        curves = list(entry.curves().values())
        for steps, losses in curves:
            ax.plot(steps, losses, color=look.color, lw=0.5, alpha=0.3)
        length = min(len(losses) for _, losses in curves)
        mean = np.mean([losses[:length] for _, losses in curves], axis=0)
        steps = curves[0][0][:length]
        smooth = _smoothed(mean)
        ax.plot(steps, smooth, color=look.color, ls=look.dash, lw=1.6)
        ends.append((float(steps[-1]), float(smooth[-1]), entry.name))
    if ax.get_ylim()[0] > 0:
        ax.set_yscale("log")
        _plain_ticks(ax)
    _end_labels(ax, ends, palette)
    ax.set_xlabel("training step")
    ax.set_ylabel("training loss")
    ax.set_title(group.label)
    return figure


def accuracy_over_latency(entries: Sequence[TradeOff], palette: dict[str, Look], *, cost: str, metric: str, title: str) -> Figure:
    """Accuracy against latency with both intervals; the step line joins the arms that no other arm beats in both."""
    figure = blank(WIDTH * 0.8, 3.2)
    ax = figure.subplots()
    costs, qualities = [entry.latency_ms.estimate for entry in entries], [entry.score.estimate for entry in entries]
    front = stats.pareto_front(costs, qualities)
    if len(front) > 1:
        steps = [costs[i] for i in front], [qualities[i] for i in front]
        ax.step(*steps, where="post", color="#999999", lw=1, ls="--", zorder=1, label="Pareto front of the means")
    for entry in entries:
        look = palette[entry.arm]
        errors: dict[str, Any] = {"xerr": _error(entry.latency_ms), "yerr": _error(entry.score)}
        ax.errorbar(
            entry.latency_ms.estimate, entry.score.estimate, **errors, color=look.color, marker=look.marker, ms=7, capsize=2, lw=1, zorder=3
        )
    ax.margins(x=0.18, y=0.16)
    for axis, means in (("x", costs), ("y", qualities)):
        spread = 4 * max(max(means) - min(means), 0.1 * max(means))
        _frame(ax, axis, max(min(means) - spread, -0.1 * max(means)), max(means) + spread)
    ax.set_xlabel(cost)
    ax.set_ylabel(f"{metric} (points)")
    ax.set_title(title)
    if len(front) > 1:
        figure.legend(loc="outside lower right", frameon=False)
    settle(figure)
    _point_labels(figure, ax, entries, palette)
    return figure


def blank(width: float, height: float) -> Figure:
    """A figure of that size in inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _panels(figure: Figure, arms: Sequence[Sequence[str]], *, columns: int, extra: float = 0.0) -> list[Axes]:
    """A grid of panels with a line per arm; arms are named once per row of panels that share them. Sets the height of the figure."""
    columns = min(columns, len(arms))
    lines = math.ceil(len(arms) / columns)
    heights = [0.22 * max(len(names) for names in arms[line * columns : (line + 1) * columns]) + 0.55 for line in range(lines)]
    figure.set_figheight(extra + sum(heights) + 0.1)
    grid = figure.subplots(lines, columns, squeeze=False, height_ratios=heights)
    for index, ax in enumerate(grid.ravel()):
        if index >= len(arms):
            ax.remove()
            continue
        named = index % columns == 0 or list(arms[index]) != list(arms[index - 1])
        ax.set_yticks(range(len(arms[index])), [label(name) if named else "" for name in arms[index]])
        ax.set_ylim(len(arms[index]) - 0.45, -0.55)
        ax.grid(False, axis="y")
    return list(grid.ravel()[: len(arms)])


def _frame(ax: Axes, axis: str, low: float, high: float) -> bool:
    """Keep an axis that reaches beyond `high` within what the means need: two rounds may give intervals a thousand times as wide.

    Returns:
        Whether the frame was narrowed, and says so at its lower edge.
    """
    first, last = getattr(ax, f"get_{axis}lim")()
    if last <= high:
        return False
    getattr(ax, f"set_{axis}lim")(max(first, low), high)
    said = "some intervals go on beyond the frame"
    ax.annotate(said, (0.99, 0.01), xycoords="axes fraction", ha="right", va="bottom", fontsize=6, color="#666666")
    return True


def settle(figure: Figure) -> None:
    """Fix the layout: its solver visits variables by address, so that unrounded positions differ in their last bits from run to run."""
    for _ in range(2):  # tick labels of the first pass move the second
        figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for ax in figure.axes:
        left, bottom, width, height = (round(float(part), 4) for part in ax.get_position().bounds)
        ax.set_position((left, bottom, width, height))


def _latency_panel(ax: Axes, group: SpeedGroup, palette: dict[str, Look], subject: str | None) -> None:
    ends = []
    for name in in_reading_order(group.arms):
        rows = sorted(group.measured(name), key=lambda row: row.pixels)
        if rows:
            _curve(ax, rows, [row.latency_ms for row in rows], palette[name])
            ends.append((float(rows[-1].pixels), rows[-1].latency_ms.estimate if rows[-1].latency_ms else 0.0, name))
    ax.set(xscale="log", yscale="log")
    _pixel_axis(ax, group)
    _plain_ticks(ax)
    ax.set_ylabel("latency of one call (ms)")
    ax.set_title("Latency")
    _frame_curves(ax)
    ax.set_ylim(ax.get_ylim())
    for baseline in group.study.baselines if subject else ():
        _mark_crossing(ax, group, str(subject), baseline, palette)
    _end_labels(ax, ends, palette)


def _speedup_panel(ax: Axes, group: SpeedGroup, palette: dict[str, Look], reference: str) -> bool:
    if reference not in group.arms:
        return False
    ends = []
    for name in in_reading_order(group.arms):
        rows = sorted((row for row in group.measured(name) if reference in row.speedups), key=lambda row: row.pixels)
        if rows:
            ratios = [row.speedups[reference] for row in rows]
            _curve(ax, rows, [Mean(ratio.estimate, ratio.low, ratio.high, ratio.rounds) for ratio in ratios], palette[name])
            ends.append((float(rows[-1].pixels), ratios[-1].estimate, name))
    ax.set(xscale="log", yscale="log")
    ax.axhline(1, color=palette[reference].color, lw=1.2)
    _pixel_axis(ax, group)
    _plain_ticks(ax, suffix=numbers.TIMES)
    ax.set_ylabel(f"times faster than {label(reference)}")
    ax.set_title(f"Speedup over {label(reference)}")
    _frame_curves(ax)
    _end_labels(ax, ends, palette)
    return bool(ends)


def _curve(ax: Axes, rows: Sequence[SpeedRow], means: Sequence[Mean | None], look: Look) -> None:
    found = [(row.pixels, mean) for row, mean in zip(rows, means, strict=True) if mean is not None]
    x = [pixels for pixels, _ in found]
    ax.plot(x, [mean.estimate for _, mean in found], color=look.color, marker=look.marker, ls=look.dash, mec="white", mew=0.5)
    bounds = [(pixels, mean.low, mean.high) for pixels, mean in found if mean.low is not None and mean.high is not None]
    if bounds:
        ax.fill_between([b[0] for b in bounds], [b[1] for b in bounds], [b[2] for b in bounds], color=look.color, alpha=0.18, lw=0)


def _frame_curves(ax: Axes) -> None:
    means = np.concatenate([np.asarray(line.get_ydata(), float) for line in ax.lines] or [np.ones(1)])
    _frame(ax, "y", float(means.min()) / 4, float(means.max()) * 4)


def _mark_crossing(ax: Axes, group: SpeedGroup, subject: str, baseline: str, palette: dict[str, Look]) -> None:
    pixels = crossing(group, subject, baseline)
    if pixels is None:
        return
    rows = sorted(group.measured(subject), key=lambda row: row.pixels)
    known = [(math.log(row.pixels), math.log(row.latency_ms.estimate)) for row in rows if row.latency_ms]
    height = math.exp(float(np.interp(math.log(pixels), [x for x, _ in known], [y for _, y in known])))
    ax.plot([pixels, pixels], [ax.get_ylim()[0], height], color=palette[baseline].color, ls=":", lw=1.1, zorder=1)
    ax.plot([pixels], [height], marker="o", ms=8, mfc="none", mec=palette[baseline].color, mew=1.2, ls="none")
    lowest = ax.get_ylim()[0]
    ax.annotate(
        f"{pixels:.0f} px",
        (pixels, lowest),
        xytext=(2, 3),
        textcoords="offset points",
        rotation=90,
        fontsize=6.5,
        color=palette[baseline].color,
        path_effects=[mpl.patheffects.withStroke(linewidth=2.0, foreground="white")],
    )


def _bars_panel(ax: Axes, group: Sequence[CountRow], components: Sequence[str]) -> None:
    heights = range(len(group))
    start = np.zeros(len(group))
    for name in components:
        parts = np.array([row.components.get(name, 0) / 1e9 for row in group])
        ax.barh(heights, parts, left=start, color=_component_color(name, components), height=0.72, ec="white", lw=0.4)
        start += parts
    for height, (row, total) in enumerate(zip(group, start, strict=True)):
        text = f"{numbers.significant(float(total))} ({row.attention_share or 0:.1%})"
        ax.annotate(text, (float(total), height), xytext=(3, 0), textcoords="offset points", va="center", fontsize=6.5)
    ax.set_xlim(0, float(start.max()) * 1.32)
    places = {(str(row.cell.params["model"]), str(row.cell.params["image_size"])) for row in group}
    model, size = next(iter(places))
    # a title begins where its panel does, and may end no later
    ax.set_title(f"{model}, {numbers.size(size)}" if len(places) == 1 else textwrap.fill(group[0].study.title, 28))
    ax.set_xlabel("GMACs per forward pass")


def _scope_panel(ax: Axes, group: SpeedGroup, palette: dict[str, Look], titled: Sequence[str]) -> None:
    rows = [row for row in group.rows if row.latency_ms is not None]
    against = first_baseline(group)
    bare = without_attention(group)
    if bare is not None and bare.latency_ms is not None:
        ax.axvline(bare.latency_ms.estimate, color="#56B4E9", ls="--", lw=1, zorder=1)
    for height, row in enumerate(rows):
        look, mean = palette[row.arm], row.latency_ms
        assert mean is not None
        ax.errorbar(mean.estimate, height, xerr=_error(mean), color=look.color, marker=look.marker, ms=5, capsize=2, lw=1.2)
        ratio = row.speedups.get(against) if against else None
        if ratio is not None:
            ax.annotate(
                f"{ratio.estimate:.2f}{numbers.TIMES}",
                (1.02, height),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=7,
                color=look.color,
                annotation_clip=False,
            )
    ax.margins(x=0.12)
    means = [row.latency_ms.estimate for row in rows if row.latency_ms]
    if _frame(ax, "x", -0.1 * max(means), 2.5 * max(means)):
        # room below the last row for what the frame says
        ax.set_ylim(len(rows), ax.get_ylim()[1])
    params = rows[0].cell.params
    words = [
        numbers.size(params[name]) if name == "image_size" else numbers.SCOPE_NAMES.get(str(params[name]), params[name]) for name in titled
    ]
    ax.set_title(", ".join(map(str, words)))
    if against:
        ax.annotate("speedup", (1.02, 1.0), xycoords="axes fraction", va="bottom", fontsize=6.5, color="#666666", annotation_clip=False)
    ax.set_xlabel("latency (ms per call)")


def _accuracy_row(ax: Axes, height: int, entry: ArmAccuracy, metric: Metric, look: Look) -> None:
    mean = entry.means.get(metric.key)
    if mean is None:
        return
    seeds = entry.points(metric)
    ax.plot(seeds, [height - 0.18] * len(seeds), marker="o", ms=3, ls="none", color=look.color, alpha=0.45)
    ax.errorbar(
        mean.estimate,
        height + 0.08,
        xerr=_error(mean),
        color=look.color,
        marker=look.marker,
        ms=6,
        capsize=2.5,
        lw=1.4,
        mec="white",
        mew=0.5,
    )


def _pixel_axis(ax: Axes, group: SpeedGroup) -> None:
    sizes = dict(sorted({row.pixels: str(row.cell.params["pixels"]) for row in group.rows}.items()))
    ax.set_xticks(list(sizes), [numbers.size(text) for text in sizes.values()], rotation=45, ha="right", rotation_mode="anchor")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel(f"pixels of the feature level (height {numbers.TIMES} width)")


def _plain_ticks(ax: Axes, suffix: str = "") -> None:
    """Ticks of a logarithmic vertical axis, written out."""
    low, high = ax.get_ylim()
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    steps = (1,) if high / low > 1e4 else (1, 2, 5) if high / low > 4 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    ticks = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_ticks(ticks)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{suffix}"))


def _end_labels(ax: Axes, ends: Sequence[tuple[float, float, str]], palette: dict[str, Look]) -> None:
    """Name each curve at its right end, moved apart where they would overlap."""
    if not ends:
        return
    low, high = np.log(ax.get_ylim()) if ax.get_yscale() == "log" else np.array(ax.get_ylim())
    heights = [((math.log(y) if ax.get_yscale() == "log" else y) - low) / (high - low) for _, y, _ in ends]
    placed = _spread(heights, gap=0.062)
    moved = max(0.0, 0.02 - min(placed)) - max(0.0, max(placed) - 0.98)
    for (x, y, name), height in zip(ends, placed, strict=True):
        ax.annotate(
            label(name),
            (x, y),
            xytext=(1.045, height + moved),
            textcoords="axes fraction",
            va="center",
            fontsize=7,
            color=palette[name].color,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": palette[name].color, "lw": 0.5, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)},
        )


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights moved as little as needed so that neighbours are `gap` apart."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    blocks: list[tuple[list[int], float]] = []
    for index in order:
        members, center = [index], heights[index]
        while blocks and center - gap * (len(members) - 1) / 2 < blocks[-1][1] + gap * (len(blocks[-1][0]) - 1) / 2 + gap:
            before, other = blocks.pop()
            center = (center * len(members) + other * len(before)) / (len(members) + len(before))
            members = before + members
        blocks.append((members, center))
    placed = list(heights)
    for members, center in blocks:
        for position, index in enumerate(members):
            placed[index] = center + gap * (position - (len(members) - 1) / 2)
    return placed


def _point_labels(figure: Figure, ax: Axes, entries: Sequence[TradeOff], palette: dict[str, Look]) -> None:
    """Name each point beside it, where there is room."""
    unit = figure.dpi / 72
    points = [tuple(ax.transData.transform((entry.latency_ms.estimate, entry.score.estimate))) for entry in entries]
    obstacles = [box for entry in entries for box in _drawn_boxes(ax, entry, unit)]
    sizes = [(4.5 * unit * len(label(entry.arm)), 9 * unit) for entry in entries]
    left, bottom, right, top = ax.get_window_extent().extents
    corners = place(points, sizes, obstacles, (left, bottom, right, top))
    for entry, point, corner in zip(entries, points, corners, strict=True):
        ax.annotate(
            label(entry.arm),
            (entry.latency_ms.estimate, entry.score.estimate),
            xytext=((corner[0] - point[0]) / unit, (corner[1] - point[1]) / unit),
            textcoords="offset points",
            va="bottom",
            color=palette[entry.arm].color,
            fontsize=7.5,
            path_effects=[mpl.patheffects.withStroke(linewidth=2.2, foreground="white")],
            zorder=5,
        )


def _drawn_boxes(ax: Axes, entry: TradeOff, unit: float) -> list[Box]:
    """Marker and error bars of a point in pixels."""
    (x_low, x, x_high), (y_low, y, y_high) = _ends(entry.latency_ms), _ends(entry.score)
    (left, low), (center, middle), (right, high) = ax.transData.transform([(x_low, y_low), (x, y), (x_high, y_high)])
    bars = [(left, middle - unit, right, middle + unit), (center - unit, low, center + unit, high)]
    return [*bars, (center - 5 * unit, middle - 5 * unit, center + 5 * unit, middle + 5 * unit)]


def _ends(mean: Mean) -> tuple[float, float, float]:
    low, high = (mean.estimate if bound is None else bound for bound in (mean.low, mean.high))
    return low, mean.estimate, high


def _error(mean: Mean) -> list[list[float]] | None:
    if mean.low is None or mean.high is None:
        return None
    return [[mean.estimate - mean.low], [mean.high - mean.estimate]]


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Running mean over a twentieth of the curve, narrower at its ends."""
    reach = max(len(values) // 40, 0)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach, len(values) - 1) + 1
    return (total[high] - total[low]) / (high - low)


def _component_color(name: str, components: Sequence[str]) -> str:
    spare = [other for other in components if other not in _COMPONENT_COLORS]
    return _COMPONENT_COLORS.get(name) or _SPARE_COLORS[spare.index(name) % len(_SPARE_COLORS)]
