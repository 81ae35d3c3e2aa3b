"""A picture of what a model will be trained on: crops after augmentation, with their targets drawn beside them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from emca_bench.data import ClassInfo
from emca_bench.data.targets import Targets
from emca_bench.train.feed import Samples, Steps
from emca_bench.train.recipe import Recipe

Pixels = npt.NDArray[np.uint8]

MARGIN = 6
LINE = 14
"""Height of a line of the legend in pixels."""
LEGEND = 230
"""Its width in pixels."""
STRENGTH = 0.55
"""Share of a target's colour over the image."""
IGNORED = (255, 0, 255)
"""Stripes over pixels without a target."""


def preview(samples: Samples, classes: Sequence[ClassInfo], recipe: Recipe, task: str) -> Image.Image:
    """The first training step of a recipe: a row per image, the crop, the crop with its targets, and what the targets are.

    Targets have the colour of their class and a white edge; pixels that belong to none are striped.

    Args:
        samples: training images.
        classes: of the labels.
        recipe: its `batch` is the number of rows.
        task: "semantic" or "panoptic".
    """
    images, targets = Steps(samples, recipe, task)[0].on("cpu")
    height, width = (int(side) for side in images.shape[-2:])
    row = max(height, LINE * (1 + max(len(target.labels.unique()) for target in targets)))
    size = (2 * width + LEGEND + 4 * MARGIN, len(targets) * (row + MARGIN) + MARGIN)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for number, (image, target) in enumerate(zip(images, targets, strict=True)):
        top = MARGIN + number * (row + MARGIN)
        pixels: Pixels = image.permute(1, 2, 0).byte().numpy()
        page.paste(Image.fromarray(pixels), (MARGIN, top))
        page.paste(Image.fromarray(drawn_targets(pixels, target, classes)), (2 * MARGIN + width, top))
        _legend(draw, target, classes, (3 * MARGIN + 2 * width, top))
    return page


def drawn_targets(image: Pixels, target: Targets, classes: Sequence[ClassInfo]) -> Pixels:
    """An image [H, W, 3] with its targets over it."""
    mixed = image.astype(np.float32)
    owner = np.zeros(image.shape[:2], dtype=np.int64)
    for number, (label, mask) in enumerate(zip(target.labels.tolist(), target.masks.numpy(), strict=True), start=1):
        color = np.array(classes[label].color, dtype=np.float32)
        mixed[mask] = (1 - STRENGTH) * mixed[mask] + STRENGTH * color
        owner[mask] = number
    edge = np.zeros(owner.shape, dtype=bool)
    edge[:, 1:] |= owner[:, 1:] != owner[:, :-1]
    edge[1:] |= owner[1:] != owner[:-1]
    mixed[edge] = 255
    rows, columns = np.indices(owner.shape)
    mixed[(owner == 0) & ((rows + columns) % 8 == 0)] = IGNORED
    return mixed.round().astype(np.uint8)


def _legend(draw: ImageDraw.ImageDraw, target: Targets, classes: Sequence[ClassInfo], corner: tuple[int, int]) -> None:
    left, top = corner
    lines = []
    for label in dict.fromkeys(target.labels.tolist()):
        masks = target.masks[target.labels == label]
        count = f" x {len(masks)}" if len(masks) > 1 else ""
        lines.append((classes[label], f"{classes[label].name}{count}: {int(masks.sum())} px"))
    for number, (info, text) in enumerate(lines):
        y = top + number * LINE
        draw.rectangle((left, y + 1, left + 10, y + 11), fill=info.color, outline="black")
        draw.text((left + 14, y), text, fill="black")
    draw.text((left, top + len(lines) * LINE), f"no target: {int((~target.valid).sum())} px", fill=IGNORED)
