"""Where to put the names of points in a figure: beside each point, clear of points, bars and other names."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

Box = tuple[float, float, float, float]
"""Left, bottom, right, top; any unit."""


def place(
    points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], obstacles: Sequence[Box], frame: Box
) -> list[tuple[float, float]]:
    """Lower left corner of each name, chosen among places around its point in turn.

    Args:
        points: what is named.
        sizes: width and height of each name.
        obstacles: markers and error bars.
        frame: the names should lie within.
    """
    taken: list[Box] = []
    corners = []
    for (x, y), (width, height) in zip(points, sizes, strict=True):
        candidates = _around(x, y, width, height)
        costs = [_cost(box, obstacles, taken, frame) + 0.02 * index * width * height for index, box in enumerate(candidates)]
        best = candidates[costs.index(min(costs))]
        taken.append(best)
        corners.append(best[:2])
    return corners


def _around(x: float, y: float, width: float, height: float) -> list[Box]:
    places = []
    for reach in (0.8, 1.7, 2.6):
        gap = reach * height
        for across, up in itertools.product((1, -1, 0), (1, -1, 0)):
            if across == up == 0:
                continue
            left = x + gap * 0.6 if across == 1 else x - gap * 0.6 - width if across == -1 else x - width / 2
            bottom = y + gap * 0.5 if up == 1 else y - gap * 0.5 - height if up == -1 else y - height / 2
            places.append((left, bottom, left + width, bottom + height))
    return places


def _cost(box: Box, obstacles: Sequence[Box], taken: Sequence[Box], frame: Box) -> float:
    area = (box[2] - box[0]) * (box[3] - box[1])
    outside = area - _overlap(box, frame)
    return sum(_overlap(box, other) for other in obstacles) + 4 * sum(_overlap(box, other) for other in taken) + 8 * outside


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
