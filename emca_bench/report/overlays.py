"""Qualitative results side by side: image, truth, the prediction of each arm, and where it errs."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from emca_bench.errors import UsageError
from emca_bench.report.accuracy import AccuracyGroup
from emca_bench.report.arms import label

IGNORE = 255
"""Class index of pixels without truth."""
MOST_IMAGES = 4
MOST_ARMS = 7
TILE = 240
"""Width of a tile in pixels."""

_GAP = 8
_HEAD = 36
_ROW_EXTRA = 38
_LINE = 30
_TEXT = "#222222"
_WRONG = (204, 51, 17)
_BLANK = (255, 255, 255)
_MAP_LEGEND = (("no truth", _BLANK), ("error map: wrong class", _WRONG), ("error map: right", (208, 208, 208)))

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
    columns, seed = _predictions(folder, group)
    numbers = sorted(path.name for path in base.glob("*") if (path / "image.png").is_file() and (path / "truth.png").is_file())
    numbers = [name for name in numbers if all((path / f"{name}.png").is_file() for path in columns.values())][:MOST_IMAGES]
    if not columns or not numbers:
        return None
    classes = _classes(base / "classes.json")
    colors = np.full((256, 3), 255, np.uint8)
    colors[: len(classes)] = [entry["color"] for entry in classes]
    rows, present = [], np.zeros(256, bool)
    for name in numbers:
        truth = _read(base / name / "truth.png", "L")
        predictions = {arm: _read(path / f"{name}.png", "L") for arm, path in columns.items()}
        for arm, prediction in predictions.items():
            if prediction.shape != truth.shape:
                raise UsageError(
                    f"{columns[arm] / name}.png is {_size(prediction)}, its truth is {_size(truth)}; delete the artifacts and run again"
                )
            present[np.unique(prediction)] = True
        present[np.unique(truth)] = True
        rows.append((_read(base / name / "image.png", "RGB"), truth, predictions))
    shown = [(entry["name"], tuple(entry["color"])) for index, entry in enumerate(classes) if present[index]]
    return Overlay(_paint(rows, colors, shown), len(rows), list(columns), seed)


def _predictions(folder: Path, group: AccuracyGroup) -> tuple[dict[str, Path], int]:
    """Folders of predictions by arm, all of the lowest seed that has any."""
    seeds = sorted({seed for entry in group.arms for seed in entry.results})
    for seed in seeds:
        found = {}
        for entry in group.arms:
            if seed in entry.results:
                path = folder / "artifacts" / "predictions" / entry.results[seed].cell.key("accuracy")
                if path.is_dir():
                    found[entry.name] = path
        if found:
            return dict(list(found.items())[:MOST_ARMS]), seed
    return {}, 0


def _classes(path: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [{"name": str(entry["name"]), "color": [int(part) for part in entry["color"]]} for entry in entries]
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no list of classes with name and color: {error}") from None


def _read(path: Path, mode: str) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image if image.mode in (mode, "P") and mode == "L" else image.convert(mode))
    except OSError as error:
        raise UsageError(f"{path} is no readable image: {error}") from None


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"


def _errors(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, float]:
    """Wrong pixels in red over a pale grey image, pixels without truth white; and the share of wrong pixels."""
    grey = image.mean(axis=2, keepdims=True).repeat(3, axis=2) * 0.35 + 160
    judged = truth != IGNORE
    wrong = judged & (prediction != truth)
    picture = np.where(wrong[..., None], np.array(_WRONG), np.where(judged[..., None], grey, np.array(_BLANK))).astype(np.uint8)
    return picture, float(wrong.sum() / max(judged.sum(), 1))


def _paint(rows: Sequence[_Row], colors: np.ndarray, shown: Sequence[tuple[str, tuple[int, ...]]]) -> bytes:
    arms = list(rows[0][2])
    heights = [round(TILE * truth.shape[0] / truth.shape[1]) for _, truth, _ in rows]
    width = _GAP + (1 + len(arms)) * (TILE + _GAP)
    legend = _legend_lines([*shown, *_MAP_LEGEND], width)
    canvas = Image.new("RGB", (width, _HEAD + sum(2 * height + _ROW_EXTRA for height in heights) + _LINE * len(legend) + _GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for index, name in enumerate(["image", *(label(arm) for arm in arms)]):
        draw.text((_left(index) + TILE / 2, _HEAD / 2), name, fill=_TEXT, font=_font(19), anchor="mm")
    top = _HEAD
    for row, height in zip(rows, heights, strict=True):
        _paint_row(canvas, draw, row, colors, top, height)
        top += 2 * height + _ROW_EXTRA
    for line in legend:
        for left, name, color in line:
            draw.rectangle((left, top + 5, left + 18, top + 23), fill=color, outline="#888888")
            draw.text((left + 25, top + 14), name, fill=_TEXT, font=_font(17), anchor="lm")
        top += _LINE
    buffer = io.BytesIO()
    # 256 colours look the same on flat label maps and take a third of the bytes
    canvas.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _paint_row(canvas: Image.Image, draw: ImageDraw.ImageDraw, row: _Row, colors: np.ndarray, top: int, height: int) -> None:
    image, truth, predictions = row
    if image.shape[:2] != truth.shape:
        image = np.asarray(Image.fromarray(image).resize(truth.shape[::-1], Image.Resampling.BILINEAR))
    size, below = (TILE, height), top + height + _GAP // 2
    canvas.paste(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS), (_left(0), top))
    canvas.paste(_tile(colors[truth], size), (_left(0), below))
    draw.text((_left(0) + TILE / 2, below + height + 12), "truth", fill=_TEXT, font=_font(17), anchor="mm")
    for index, prediction in enumerate(predictions.values(), start=1):
        picture, share = _errors(image, truth, prediction)
        canvas.paste(_tile(colors[prediction], size), (_left(index), top))
        canvas.paste(_tile(picture, size), (_left(index), below))
        draw.text((_left(index) + TILE / 2, below + height + 12), f"{share:.1%} wrong", fill=_TEXT, font=_font(17), anchor="mm")


def _tile(array: np.ndarray, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(array).resize(size, Image.Resampling.NEAREST)


def _left(column: int) -> int:
    return _GAP + column * (TILE + _GAP)


def _legend_lines(entries: Sequence[tuple[str, tuple[int, ...]]], width: int) -> list[list[tuple[int, str, tuple[int, ...]]]]:
    lines: list[list[tuple[int, str, tuple[int, ...]]]] = [[]]
    left = _GAP
    for name, color in entries:
        needed = 25 + round(_font(17).getlength(name)) + 24
        if lines[-1] and left + needed > width:
            lines.append([])
            left = _GAP
        lines[-1].append((left, name, color))
        left += needed
    return lines


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
