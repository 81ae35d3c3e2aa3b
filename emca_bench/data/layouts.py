"""A folder of images as the data set that it is: by the layout that its files have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from emca_bench.data.ade20k import LONG, ade20k_folder, ade20k_panoptic_folder
from emca_bench.data.base import Dataset
from emca_bench.data.camvid import camvid
from emca_bench.data.cityscapes import cityscapes, cityscapes_panoptic
from emca_bench.data.coco_panoptic import SPLITS, coco_folder, split_folder
from emca_bench.data.facade import facade
from emca_bench.errors import UsageError, did_you_mean, listing


class Layout(NamedTuple):
    """How a data set lies on disk.

    Attributes:
        open: (folder, split) to the split.
        splits: that there may be.
        marks: files or folders, as patterns with {split} or {long}, that all are there where the split is.
        folder: the name that the folder must have; "" for any.
    """

    open: Callable[[Path, str], Dataset]
    splits: tuple[str, ...]
    marks: tuple[str, ...]
    folder: str = ""


def _beside(factory: Callable[..., Dataset], folder: Path, split: str) -> Dataset:
    return factory(split, root=folder.parent)


def _own(folder: Path, split: str) -> Dataset:
    return split_folder(folder, folder.name, split)


LAYOUTS: dict[str, Layout] = {
    "camvid": Layout(partial(_beside, camvid), SPLITS, ("images/{split}", "annotations/{split}"), "camvid"),
    "facade": Layout(partial(_beside, facade), SPLITS, ("panoptic_{split}.json",), "facade"),
    "ade20k": Layout(ade20k_folder, tuple(LONG), ("objectInfo150.txt", "annotations*/{long}")),
    "ade20k_panoptic": Layout(ade20k_panoptic_folder, tuple(LONG), ("ade20k_panoptic_{split}*.json",)),
    "cityscapes": Layout(partial(_beside, cityscapes), tuple(LONG), ("gtFine/{split}",), "cityscapes"),
    "cityscapes_panoptic": Layout(partial(_beside, cityscapes_panoptic), tuple(LONG), ("gtFine/{split}",), "cityscapes"),
    "coco": Layout(coco_folder, tuple(LONG), ("{split}2017",)),
    "own": Layout(_own, SPLITS, ("panoptic_{split}.json",)),
}


def layouts_of(folder: Path, layout: str | None = None) -> list[str]:
    """The layouts that a folder has, the more specific in place of `own`.

    Raises:
        UsageError: no such folder, an unknown layout, or none that fits.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; expected one that holds a data set")
    if layout is not None:
        if layout not in LAYOUTS:
            raise UsageError(f"unknown layout {layout!r}{did_you_mean(layout, LAYOUTS)}; known: {listing(LAYOUTS)}")
        return [layout]
    found = [name for name in LAYOUTS if splits_of(folder, name)]
    specific = [name for name in found if name != "own"]
    if not found:
        told = ", ".join(sorted({mark for entry in LAYOUTS.values() for mark in entry.marks}))
        raise UsageError(f"{folder} has no layout that is known: it holds none of {told}; docs/datasets.md shows what goes where")
    return specific or found


def splits_of(folder: Path, layout: str) -> list[str]:
    """The splits of a layout for which there is anything in a folder."""
    _, splits, marks, name = LAYOUTS[layout]
    if name and folder.resolve().name != name:
        return []
    return [split for split in splits if all(any(folder.glob(mark.format(split=split, long=LONG.get(split)))) for mark in marks)]


def open_split(folder: Path, layout: str, split: str) -> Dataset:
    """A split of a folder; UsageError with what is wrong where it cannot be opened."""
    return LAYOUTS[layout].open(folder.resolve(), split)
