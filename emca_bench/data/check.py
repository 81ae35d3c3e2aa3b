"""Every file of a data set read once: what is there, how often, and what is broken."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from emca_bench.data.base import IGNORE, ClassInfo, Dataset, Sample
from emca_bench.data.layouts import layouts_of, open_split, splits_of
from emca_bench.errors import UsageError

SHOWN_PROBLEMS = 20
"""Problems of a split that are printed in full."""


@dataclass
class SplitCheck:
    """What one split holds.

    Attributes:
        layout, split: which one.
        classes: of the labels.
        images: number of files; `read` of them could be read.
        sizes: (H, W) of the smallest and the largest image by area.
        pixels: by class, and at IGNORE the ignored ones.
        present: images in which a class occurs.
        segments: number of segments by class, where there are any.
        unlabelled: images without a labelled pixel.
        problems: a sentence each.
        hashes: of image contents, for copies in other splits.
    """

    layout: str
    split: str
    classes: tuple[ClassInfo, ...] = ()
    images: int = 0
    read: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    pixels: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, dtype=np.int64))
    present: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, dtype=np.int64))
    segments: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, dtype=np.int64))
    unlabelled: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)

    def add(self, sample: Sample) -> None:
        """Count one image."""
        self.read += 1
        self.sizes = sorted({*self.sizes, sample.size}, key=lambda size: size[0] * size[1])
        self.sizes = [self.sizes[0], self.sizes[-1]] if len(self.sizes) > 1 else self.sizes
        counts = np.bincount(sample.semantic.ravel(), minlength=256)
        self.pixels += counts
        self.present += counts > 0
        for segment in sample.segments:
            self.segments[segment.category] += 1
        if counts[:IGNORE].sum() == 0:
            self.unlabelled.append(sample.name)
        self.hashes[hashlib.sha256(sample.image.tobytes()).hexdigest()] = sample.name


def check_folder(
    folder: Path, *, layout: str | None = None, limit: int = 0, on_image: Callable[[str, int, int], None] = lambda what, done, total: None
) -> list[SplitCheck]:
    """Read all splits of a folder.

    Args:
        folder: of the data set.
        layout: one of LAYOUTS; None finds it.
        limit: images of a split that are read, the first ones; 0 for all.
        on_image: called with the split, the number of images read and their total.

    Raises:
        UsageError: no folder, or no layout that fits.
    """
    checks: list[SplitCheck] = []
    for name in layouts_of(folder, layout):
        seen: list[SplitCheck] = []
        for split in splits_of(folder, name):
            found = _check_split(folder, name, split, limit, on_image)
            found.problems += _copies(found, seen)
            seen.append(found)
        checks += seen
    if not checks:
        raise UsageError(f"{folder} holds no split of layout {layout!r}; docs/datasets.md shows what goes where")
    return checks


def _check_split(folder: Path, layout: str, split: str, limit: int, on_image: Callable[[str, int, int], None]) -> SplitCheck:
    found = SplitCheck(layout, split)
    try:
        dataset = open_split(folder, layout, split)
    except UsageError as error:
        found.problems.append(str(error))
        return found
    found.classes, found.images = dataset.classes, len(dataset)
    total = min(len(dataset), limit or len(dataset))
    for index in range(total):
        _check_image(dataset, index, found)
        on_image(f"{layout} {split}", index + 1, total)
    return found


def _check_image(dataset: Dataset, index: int, found: SplitCheck) -> None:
    try:
        found.add(dataset[index])
    except UsageError as error:
        found.problems.append(str(error))


def _copies(found: SplitCheck, others: Sequence[SplitCheck]) -> Iterator[str]:
    for other in others:
        shared = found.hashes.keys() & other.hashes.keys()
        if shared:
            name = min(found.hashes[key] for key in shared)
            count = "an image is" if len(shared) == 1 else f"{len(shared)} images are"
            yield f"{count} in {other.split} too, {name!r} for one: scores on {found.split} would not mean anything"


def describe(check: SplitCheck) -> list[str]:
    """The lines that `emca-bench data check` prints for a split."""
    lines = [f"{check.layout} {check.split}: {check.read} of {check.images} images read" + _size_text(check.sizes)]
    total = max(1, int(check.pixels.sum()))
    width = max((len(info.name) for info in check.classes), default=0)
    for index, info in enumerate(check.classes):
        kind = "thing" if info.thing else "stuff"
        segments = f", {check.segments[index]:7d} segments" if check.segments.any() else ""
        share = f"{check.pixels[index] / total:8.3%} of the pixels"
        lines.append(f"  {index:3d} {info.name:{width}} {kind} {share}, in {check.present[index]:5d} images{segments}")
    lines.append(f"  {IGNORE:3d} {'ignored':{width}}       {check.pixels[IGNORE] / total:8.3%} of the pixels")
    absent = [info.name for index, info in enumerate(check.classes) if check.read and not check.present[index]]
    if absent:
        lines.append(f"  classes that no image has: {', '.join(absent)}")
    if check.unlabelled:
        lines.append(f"  images without a labelled pixel: {len(check.unlabelled)}, {check.unlabelled[0]!r} for one")
    lines += [f"  PROBLEM: {problem}" for problem in check.problems[:SHOWN_PROBLEMS]]
    if len(check.problems) > SHOWN_PROBLEMS:
        lines.append(f"  PROBLEM: and {len(check.problems) - SHOWN_PROBLEMS} more")
    return lines


def _size_text(sizes: Sequence[tuple[int, int]]) -> str:
    texts = [f"{height}x{width}" for height, width in sizes]
    return "" if not texts else f", all {texts[0]}" if len(texts) == 1 else f", {texts[0]} to {texts[1]}"
