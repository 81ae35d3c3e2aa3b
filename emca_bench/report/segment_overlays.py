"""Qualitative results of one set of weights: label map, panoptic segments and instances of each arm, below the truth."""

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
from emca_bench.report.overlays import Overlay
from emca_bench.report.pictures import GAP, IGNORE, LINE, PALE, TEXT, WRONG

TILE = 172
"""Width of a tile in pixels."""
BLOCKS = 2
"""Test images side by side."""

_SIDE = 26
_HEAD = 30
_COLUMNS = ("image / errors", "semantic", "panoptic", "instances")
_LEGEND = (("error map: wrong class", WRONG), ("no truth, or no segment", PALE))
_FONT = pictures.font(16)


@dataclass(frozen=True)
class _Labels:
    """Maps of one image from one source; segments hold a class [H, W], or IGNORE, and a number [H, W], or 0."""

    semantic: np.ndarray
    panoptic: tuple[np.ndarray, np.ndarray]
    instances: tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class _Palette:
    """By class index: colour [256, 3], PALE for what is no class, and whether instances are counted [256]."""

    colors: np.ndarray
    countable: np.ndarray


@dataclass(frozen=True)
class _Block:
    """One test image."""

    image: np.ndarray
    truth: _Labels
    arms: Mapping[str, _Labels]


def segment_overlay(folder: Path, group: AccuracyGroup) -> Overlay | None:
    """The picture of a group of task "panoptic", or None where the run folder holds no predictions for it.

    Raises:
        UsageError: a class list or image that cannot be read, or a result of another size than its truth.
    """
    base = folder / "artifacts" / group.dataset
    columns, seed = pictures.prediction_folders(folder, group)
    there = sorted(path.parent.name for path in base.glob("*/truth_panoptic.png"))
    kept = [name for name in there if all((path / f"{name}_instances.png").is_file() for path in columns.values())]
    if not columns or not kept:
        return None
    classes = pictures.read_classes(base / "classes.json")
    palette = _Palette(np.full((256, 3), PALE, np.uint8), np.zeros(256, bool))
    palette.colors[: len(classes)] = [entry["color"] for entry in classes]
    palette.countable[: len(classes)] = [entry["thing"] for entry in classes]
    blocks = [_block(base / name, {arm: path / name for arm, path in columns.items()}, palette) for name in kept[: pictures.MOST_IMAGES]]
    present = np.unique(np.concatenate([labels.semantic.ravel() for block in blocks for labels in (block.truth, *block.arms.values())]))
    shown = [(entry["name"], tuple(entry["color"])) for index, entry in enumerate(classes) if index in present]
    return Overlay(_paint(blocks, palette, [*shown, *_LEGEND]), len(blocks), list(columns), seed)


def _block(truth: Path, arms: Mapping[str, Path], palette: _Palette) -> _Block:
    category, number = _segments(truth / "truth_panoptic.png")
    countable = palette.countable[category]
    only_things = np.where(countable, category, IGNORE), np.where(countable, number, 0)
    labels = _Labels(pictures.read_image(truth / "truth.png", "L"), (category, number), only_things)
    found = {}
    for arm, stem in arms.items():
        semantic, whole, single = (Path(f"{stem}{end}.png") for end in ("", "_panoptic", "_instances"))
        found[arm] = _Labels(pictures.read_image(semantic, "L"), _segments(whole), _segments(single))
        for path, array in ((semantic, found[arm].semantic), (whole, found[arm].panoptic[0]), (single, found[arm].instances[0])):
            if array.shape != category.shape:
                sizes = f"{path} is {pictures.size_of(array)}, its truth is {pictures.size_of(category)}"
                raise UsageError(f"{sizes}; delete the artifacts and run again")
    return _Block(pictures.read_image(truth / "image.png", "RGB"), labels, found)


def _segments(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Class, or IGNORE, in red; number of the segment in green and 256 blue."""
    channels = pictures.read_image(path, "RGB").astype(np.int64)
    return channels[..., 0], channels[..., 1] + 256 * channels[..., 2]


def _paint(blocks: Sequence[_Block], palette: _Palette, entries: Sequence[pictures.LegendEntry]) -> bytes:
    names = ["truth", *(label(arm) for arm in blocks[0].arms)]
    across = min(BLOCKS, len(blocks))
    lines = [blocks[start : start + across] for start in range(0, len(blocks), across)]
    tall = [max(_height(block) for block in line) for line in lines]
    stride = len(_COLUMNS) * (TILE + GAP // 2) + 2 * GAP
    width = _SIDE + across * stride
    legend = pictures.legend_lines(entries, width)
    height = sum(_HEAD + len(names) * (tile + GAP // 2) + GAP for tile in tall) + LINE * len(legend) + GAP
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    top = 0
    for line, tile in zip(lines, tall, strict=True):
        for place, block in enumerate(line):
            left = _SIDE + place * stride
            for index, title in enumerate(_COLUMNS):
                draw.text((left + index * (TILE + GAP // 2) + TILE / 2, top + _HEAD / 2), title, fill=TEXT, font=_FONT, anchor="mm")
            _paint_block(canvas, block, palette, left, top + _HEAD, tile)
        for index, name in enumerate(names):
            _paint_sideways(canvas, name, top + _HEAD + index * (tile + GAP // 2) + tile // 2)
        top += _HEAD + len(names) * (tile + GAP // 2) + GAP
    pictures.paint_legend(draw, legend, top)
    return pictures.as_png(canvas, flat=False)


def _height(block: _Block) -> int:
    return round(TILE * block.truth.semantic.shape[0] / block.truth.semantic.shape[1])


def _paint_block(canvas: Image.Image, block: _Block, palette: _Palette, left: int, top: int, stride: int) -> None:
    size = (TILE, _height(block))
    image = Image.fromarray(block.image).resize(size, Image.Resampling.LANCZOS)
    for row, labels in enumerate((block.truth, *block.arms.values())):
        first = image
        if row:
            wrong, share = pictures.error_map(block.image, block.truth.semantic, labels.semantic)
            first = pictures.tile(wrong, size)
            _note(first, f"{share:.0%} wrong")
        segments = [_segment_tile(np.asarray(image), *found, palette) for found in (labels.panoptic, labels.instances)]
        for index, tile in enumerate([first, pictures.tile(palette.colors[labels.semantic], size), *segments]):
            canvas.paste(tile, (left + index * (TILE + GAP // 2), top + row * (stride + GAP // 2)))


def _segment_tile(image: np.ndarray, category: np.ndarray, number: np.ndarray, palette: _Palette) -> Image.Image:
    """Segments in the colour of their class over a pale grey image, with an edge around each."""
    size = image.shape[1], image.shape[0]
    kind, ids = (np.asarray(Image.fromarray(part.astype(np.int32)).resize(size, Image.Resampling.NEAREST)) for part in (category, number))
    grey = image.mean(axis=2, keepdims=True).repeat(3, axis=2)
    # things of one class are told apart by shade: a golden section further for each
    shade = np.where(palette.countable[kind], 0.75 + 0.5 * (ids * 0.618033988749895 % 1), 1.0)[..., None]
    color = np.clip(palette.colors[kind] * shade, 0, 255)
    picture = np.where((kind == IGNORE)[..., None], grey * 0.35 + 150, 0.75 * color + 0.25 * grey)
    edge = np.zeros(ids.shape, bool)
    edge[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    edge[1:] |= ids[1:] != ids[:-1]
    picture[edge] = 0.3 * picture[edge] + 0.7 * 255
    return Image.fromarray(picture.round().astype(np.uint8))


def _note(tile: Image.Image, text: str) -> None:
    """A line of text in the lower left corner of a tile."""
    draw = ImageDraw.Draw(tile)
    box = draw.textbbox((5, tile.height - 5), text, font=pictures.font(14), anchor="ld")
    draw.rectangle((box[0] - 5, box[1] - 3, box[2] + 4, tile.height), fill="white")
    draw.text((5, tile.height - 5), text, fill=TEXT, font=pictures.font(14), anchor="ld")


def _paint_sideways(canvas: Image.Image, text: str, middle: int) -> None:
    """Text from bottom to top along the left edge."""
    length = round(_FONT.getlength(text)) + 4
    strip = Image.new("RGB", (length, _SIDE), "white")
    ImageDraw.Draw(strip).text((length / 2, _SIDE / 2), text, fill=TEXT, font=_FONT, anchor="mm")
    turned = strip.rotate(90, expand=True)
    canvas.paste(turned, (0, middle - turned.height // 2))
