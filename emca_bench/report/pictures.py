"""What overlays share: reading what a run has kept, tiles, legends."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from emca_bench.errors import UsageError
from emca_bench.report.accuracy import AccuracyGroup

IGNORE = 255
"""Class index of pixels without truth."""
MOST_IMAGES = 4
MOST_ARMS = 7

GAP = 8
LINE = 30
TEXT = "#222222"
WRONG = (204, 51, 17)
BLANK = (255, 255, 255)
PALE = (208, 208, 208)

LegendEntry = tuple[str, tuple[int, ...]]


def prediction_folders(folder: Path, group: AccuracyGroup) -> tuple[dict[str, Path], int]:
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


def read_classes(path: Path) -> list[dict[str, Any]]:
    """Names and colours of the classes, in the order of their indices; UsageError where the file is none."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [
            {"name": str(entry["name"]), "thing": bool(entry.get("thing")), "color": [int(part) for part in entry["color"]]}
            for entry in entries
        ]
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no list of classes with name and color: {error}") from None


def read_image(path: Path, mode: str) -> np.ndarray:
    """Pixels of an image in a Pillow mode; UsageError where it cannot be read."""
    try:
        with Image.open(path) as image:
            return np.asarray(image if image.mode in (mode, "P") and mode == "L" else image.convert(mode))
    except OSError as error:
        raise UsageError(f"{path} is no readable image: {error}") from None


def size_of(array: np.ndarray) -> str:
    """Width and height in words."""
    return f"{array.shape[1]}x{array.shape[0]}"


def error_map(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, float]:
    """Wrong pixels in red over a pale grey image, pixels without truth white; and the share of wrong pixels."""
    grey = image.mean(axis=2, keepdims=True).repeat(3, axis=2) * 0.35 + 160
    judged = truth != IGNORE
    wrong = judged & (prediction != truth)
    picture = np.where(wrong[..., None], np.array(WRONG), np.where(judged[..., None], grey, np.array(BLANK))).astype(np.uint8)
    return picture, float(wrong.sum() / max(judged.sum(), 1))


def tile(array: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Label colours at a size, without new ones in between."""
    return Image.fromarray(array).resize(size, Image.Resampling.NEAREST)


def legend_lines(entries: Sequence[LegendEntry], width: int) -> list[list[tuple[int, str, tuple[int, ...]]]]:
    """Entries with their places from the left, broken into lines that fit a width."""
    lines: list[list[tuple[int, str, tuple[int, ...]]]] = [[]]
    left = GAP
    for name, color in entries:
        needed = 25 + round(font(17).getlength(name)) + 24
        if lines[-1] and left + needed > width:
            lines.append([])
            left = GAP
        lines[-1].append((left, name, color))
        left += needed
    return lines


def paint_legend(draw: ImageDraw.ImageDraw, lines: Sequence[Sequence[tuple[int, str, tuple[int, ...]]]], top: int) -> None:
    """Lines of `legend_lines` from a height on."""
    for line in lines:
        for left, name, color in line:
            draw.rectangle((left, top + 5, left + 18, top + 23), fill=color, outline="#888888")
            draw.text((left + 25, top + 14), name, fill=TEXT, font=font(17), anchor="lm")
        top += LINE


def as_png(canvas: Image.Image, *, flat: bool) -> bytes:
    """The bytes of a PNG file; on flat label maps 256 colours look the same and take a third of the bytes, on shaded ones they do not."""
    buffer = io.BytesIO()
    if flat:
        canvas = canvas.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    canvas.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def font(size: int) -> Any:
    """The font of all overlays."""
    return ImageFont.load_default(size)
