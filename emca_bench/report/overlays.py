"""Qualitative results side by side: image, truth, the prediction of each arm, and where it errs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from emca_bench.errors import UsageError
from emca_bench.report import pictures
from emca_bench.report.accuracy import AccuracyGroup
from emca_bench.report.arms import label
from emca_bench.report.pictures import BLANK, GAP, LINE, PALE, TEXT, WRONG, LegendEntry

TILE = 240
"""Width of a tile in pixels."""

_HEAD = 36
_ROW_EXTRA = 38
_MAP_LEGEND = (("no truth", BLANK), ("error map: wrong class", WRONG), ("error map: right", PALE))

_Row = tuple[np.ndarray, np.ndarray, Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Overlay:
    """One picture for one data set."""

    png: bytes
    images: int
    arms: Sequence[str]
    seed: int


def overlay(folder: Path, group: AccuracyGroup) -> Overlay | None:
    """The picture of a group, or None where the run folder holds no predictions for it.

    Raises:
        UsageError: a class list or image that cannot be read, or a prediction of another size than its truth.
    """
    base = folder / "artifacts" / group.dataset
    columns, seed = pictures.prediction_folders(folder, group)
    numbers = sorted(path.name for path in base.glob("*") if (path / "image.png").is_file() and (path / "truth.png").is_file())
    numbers = [name for name in numbers if all((path / f"{name}.png").is_file() for path in columns.values())][: pictures.MOST_IMAGES]
    if not columns or not numbers:
        return None
    classes = pictures.read_classes(base / "classes.json")
    colors = np.full((256, 3), 255, np.uint8)
    colors[: len(classes)] = [entry["color"] for entry in classes]
    rows, present = [], np.zeros(256, bool)
    for name in numbers:
        truth = pictures.read_image(base / name / "truth.png", "L")
        predictions = {arm: pictures.read_image(path / f"{name}.png", "L") for arm, path in columns.items()}
        for arm, prediction in predictions.items():
            if prediction.shape != truth.shape:
                sizes = f"{columns[arm] / name}.png is {pictures.size_of(prediction)}, its truth is {pictures.size_of(truth)}"
                raise UsageError(f"{sizes}; delete the artifacts and run again")
            present[np.unique(prediction)] = True
        present[np.unique(truth)] = True
        rows.append((pictures.read_image(base / name / "image.png", "RGB"), truth, predictions))
    shown = [(entry["name"], tuple(entry["color"])) for index, entry in enumerate(classes) if present[index]]
    return Overlay(_paint(rows, colors, shown), len(rows), list(columns), seed)


def _paint(rows: Sequence[_Row], colors: np.ndarray, shown: Sequence[LegendEntry]) -> bytes:
    arms = list(rows[0][2])
    heights = [round(TILE * truth.shape[0] / truth.shape[1]) for _, truth, _ in rows]
    width = GAP + (1 + len(arms)) * (TILE + GAP)
    legend = pictures.legend_lines([*shown, *_MAP_LEGEND], width)
    canvas = Image.new("RGB", (width, _HEAD + sum(2 * height + _ROW_EXTRA for height in heights) + LINE * len(legend) + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for index, name in enumerate(["image", *(label(arm) for arm in arms)]):
        draw.text((_left(index) + TILE / 2, _HEAD / 2), name, fill=TEXT, font=pictures.font(19), anchor="mm")
    top = _HEAD
    for row, height in zip(rows, heights, strict=True):
        _paint_row(canvas, draw, row, colors, top, height)
        top += 2 * height + _ROW_EXTRA
    pictures.paint_legend(draw, legend, top)
    return pictures.as_png(canvas, flat=True)


def _paint_row(canvas: Image.Image, draw: ImageDraw.ImageDraw, row: _Row, colors: np.ndarray, top: int, height: int) -> None:
    image, truth, predictions = row
    if image.shape[:2] != truth.shape:
        image = np.asarray(Image.fromarray(image).resize(truth.shape[::-1], Image.Resampling.BILINEAR))
    size, below = (TILE, height), top + height + GAP // 2
    canvas.paste(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS), (_left(0), top))
    canvas.paste(pictures.tile(colors[truth], size), (_left(0), below))
    draw.text((_left(0) + TILE / 2, below + height + 12), "truth", fill=TEXT, font=pictures.font(17), anchor="mm")
    for index, prediction in enumerate(predictions.values(), start=1):
        picture, share = pictures.error_map(image, truth, prediction)
        canvas.paste(pictures.tile(colors[prediction], size), (_left(index), top))
        canvas.paste(pictures.tile(picture, size), (_left(index), below))
        draw.text((_left(index) + TILE / 2, below + height + 12), f"{share:.1%} wrong", fill=TEXT, font=pictures.font(17), anchor="mm")


def _left(column: int) -> int:
    return GAP + column * (TILE + GAP)
