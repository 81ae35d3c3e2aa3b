"""The roofline: FLOP/s of operators against their FLOP per byte, below what the machine was seen to do in the same study."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from emca_bench.report import numbers
from emca_bench.report.arms import in_reading_order, label
from emca_bench.report.figures import WIDTH, Look, blank, settle
from emca_bench.report.kernels import KernelGroup, flops_rate, intensity
from emca_bench.report.placement import Box, place
from emca_bench.report.speed import SpeedRow

PANEL_HEIGHT = 2.75
MARKER_SIZES = (3.5, 8.0)
"""Points: of the fewest and of the most pixels."""
_ROOF = "#444444"
_GIGA = 1e9
_HALO = withStroke(linewidth=2.2, foreground="white")


def roofline(groups: Sequence[KernelGroup], palette: dict[str, Look]) -> Figure | None:
    """A panel per setting, arms as curves over growing numbers of pixels; None without ceilings or without a measured operator."""
    shown = [group for group in groups if group.compute and group.memory and any(row.latency_ms for row in group.group.rows)]
    if not shown:
        return None
    columns = min(2, len(shown))
    lines = -(-len(shown) // columns)
    figure = blank(WIDTH, PANEL_HEIGHT * lines + 0.35)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for index, ax in enumerate(grid.ravel()):
        if index >= len(shown):
            ax.remove()
            continue
        _panel(ax, shown[index], palette, _title(shown, index))
    _limits(list(grid.ravel()[: len(shown)]), shown)
    for ax in grid[:, 0]:
        ax.set_ylabel("GFLOP/s")
    for column in range(columns):
        last = max(line for line in range(lines) if line * columns + column < len(shown))
        grid[last, column].set_xlabel("FLOP per byte of the least traffic")
        grid[last, column].tick_params(labelbottom=True)
    handles = dict(pair[::-1] for ax in grid.ravel()[: len(shown)] for pair in zip(*ax.get_legend_handles_labels(), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=max(len(handles), 1), frameon=False)
    # what is turned and moved to where there is room needs the final places of the panels
    settle(figure)
    for ax, group in zip(grid.ravel(), shown, strict=False):
        _roof(ax, group)
        _shares(ax, group, palette, figure.dpi / 72)
    return figure


def _title(groups: Sequence[KernelGroup], index: int) -> str:
    """What tells a panel from the others."""
    shared = groups[index].group.shared
    names = [name for name in shared if name not in ("op", "pixels") and len({group.group.shared.get(name) for group in groups}) > 1]
    return numbers.conditions({name: shared[name] for name in names}) or numbers.conditions({"dtype": shared.get("dtype", "float32")})


def _points(group: KernelGroup, arm: str) -> list[tuple[SpeedRow, float, float]]:
    rows = sorted(group.group.measured(arm), key=lambda row: row.pixels)
    return [(row, x, y / _GIGA) for row in rows if (x := intensity(row)) is not None and (y := flops_rate(row)) is not None]


def _panel(ax: Axes, group: KernelGroup, palette: dict[str, Look], title: str) -> None:
    sizes = sorted({row.pixels for row in group.group.rows})
    for name in in_reading_order(group.group.arms):
        points, look = _points(group, name), palette[name]
        if not points:
            continue
        ax.plot([x for _, x, _ in points], [y for _, _, y in points], color=look.color, lw=0.8, alpha=0.6, zorder=3)
        drawn: dict[str, Any] = {"color": look.color, "marker": look.marker, "ls": "none", "mec": "white", "mew": 0.6, "zorder": 4}
        # the largest below, so that it hides none; it stands in the legend
        named: str | None = label(name)
        for row, x, y in reversed(points):
            grown = float(np.interp(sizes.index(row.pixels) / max(len(sizes) - 1, 1), [0, 1], MARKER_SIZES))
            ax.plot(x, y, ms=grown, label=named, **drawn)
            named = None
    ax.set(xscale="log", yscale="log")
    ax.set_title(title)


def _limits(axes: Sequence[Axes], groups: Sequence[KernelGroup]) -> None:
    """One window for all panels, from a little left of the ridge or of the points to a little right of them."""
    points = [point for group in groups for name in group.group.arms for point in _points(group, name)]
    compute = [group.compute.rate / _GIGA for group in groups if group.compute]
    ridges = [group.compute.rate / group.memory.rate for group in groups if group.compute and group.memory]
    left, right = min([x for _, x, _ in points] + ridges) / 3, max([x for _, x, _ in points] + ridges) * 4
    lowest = min(y for _, _, y in points)
    for ax in axes:
        ax.set_xlim(left, right)
        ax.set_ylim(lowest / 2, max(compute) * 2.2)
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _roof(ax: Axes, group: KernelGroup) -> None:
    assert group.compute is not None
    assert group.memory is not None
    (left, right), (low, _) = ax.get_xlim(), ax.get_ylim()
    flat, slope = group.compute.rate / _GIGA, group.memory.rate / _GIGA
    ridge = flat / slope
    ax.plot([left, ridge, right], [left * slope, flat, flat], color=_ROOF, lw=1.4, zorder=2, solid_joinstyle="miter")
    ax.fill_between([left, ridge, right], [left * slope, flat, flat], ax.get_ylim()[1], color="#F3F3F3", lw=0, zorder=0)
    words: dict[str, Any] = {"fontsize": 6.5, "color": _ROOF, "zorder": 5}
    top = f"{numbers.significant(flat)} GFLOP/s ({group.compute.name})"
    ax.annotate(top, (right, flat), xytext=(-3, 3), textcoords="offset points", ha="right", va="bottom", **words)
    middle = (max(left, low / slope) * min(ridge, right)) ** 0.5
    (x_low, y_low), (x_high, y_high) = ax.transData.transform([(middle, middle * slope), (2 * middle, 2 * middle * slope)])
    angle = math.degrees(math.atan2(y_high - y_low, x_high - x_low))
    side = f"{numbers.significant(slope)} GB/s ({group.memory.name})"
    along: dict[str, Any] = {
        "xytext": (3, -4),
        "textcoords": "offset points",
        "rotation": angle,
        "rotation_mode": "anchor",
        "ha": "center",
        "va": "top",
    }
    ax.annotate(side, (middle, middle * slope), **along, **words)


def _shares(ax: Axes, group: KernelGroup, palette: dict[str, Look], unit: float) -> None:
    """Write each arm's share of the bound beside its point at the most pixels, where there is room. `unit`: pixels of a point."""
    found = {name: points for name in group.group.arms if (points := _points(group, name))}
    every = ax.transData.transform([(x, y) for points in found.values() for _, x, y in points])
    reach = MARKER_SIZES[1] / 2 * unit
    obstacles: list[Box] = [(x - reach, y - reach, x + reach, y + reach) for x, y in every]
    named = {name: text for name, points in found.items() if (text := _share(group, points[-1][0]))}
    ends = [tuple(ax.transData.transform(found[name][-1][1:])) for name in named]
    sizes = [(4.6 * unit * len(text), 8 * unit) for text in named.values()]
    left, bottom, right, top = ax.get_window_extent().extents
    for (name, text), end, corner in zip(named.items(), ends, place(ends, sizes, obstacles, (left, bottom, right, top)), strict=True):
        away: Any = ((corner[0] - end[0]) / unit, (corner[1] - end[1]) / unit)
        look: dict[str, Any] = {"color": palette[name].color, "fontsize": 7, "path_effects": [_HALO], "zorder": 5}
        ax.annotate(text, found[name][-1][1:], xytext=away, textcoords="offset points", va="bottom", **look)


def _share(group: KernelGroup, row: SpeedRow) -> str:
    reached = group.reached(row)
    return "" if reached is None else numbers.share(reached)
