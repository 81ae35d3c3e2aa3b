"""ADE20K as SceneParse150 prepares it: 150 classes, semantic or panoptic."""

from __future__ import annotations

import os
from pathlib import Path

from emca_bench.data.base import DATASETS, IGNORE, ClassInfo, check_split
from emca_bench.data.coco_panoptic import CocoPanoptic, palette
from emca_bench.data.folder import SemanticFolder, find_dataset_folder, first_existing
from emca_bench.errors import UsageError

FOLDER = "ADEChallengeData2016"
LONG = {"train": "training", "val": "validation"}
"""The splits, and what their folders are called."""

CLASSES = 150
STUFF = frozenset(
    {
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        10,
        12,
        14,
        17,
        18,
        22,
        26,
        27,
        29,
        30,
        35,
        41,
        47,
        49,
        52,
        53,
        55,
        60,
        61,
        62,
        64,
        69,
        78,
        80,
        85,
        92,
        95,
        97,
        100,
        101,
        102,
        106,
        107,
        110,
        114,
        115,
        118,
        123,
        129,
        132,
        141,
        142,
        146,
    }
)
"""Numbers, from 1, of the 50 classes that are not counted; the other 100 are things."""


@DATASETS.register("ade20k")
def ade20k(split: str, *, root: str | os.PathLike[str] | None = None) -> SemanticFolder:
    """ADE20K with semantic labels, from `<root>/ADEChallengeData2016/{images,annotations}/{training,validation}`.

    `annotations_detectron2`, which detectron2's preparation makes, serves where `annotations` is not there.

    Args:
        split: "train" or "val"; the labels of the test set are secret.
        root: the folder that holds "ADEChallengeData2016"; None for the places of the environment.

    Raises:
        UsageError: see SemanticFolder and find_dataset_folder; no list of the classes.
    """
    return ade20k_folder(find_dataset_folder("ade20k", root, folder=FOLDER), split)


def ade20k_folder(folder: Path, split: str) -> SemanticFolder:
    """A split from the layout of `ade20k`."""
    check_split("ade20k", split, tuple(LONG))
    labels = first_existing(
        f"labels of ade20k {split}", folder / "annotations" / LONG[split], folder / "annotations_detectron2" / LONG[split]
    )
    original = {0: IGNORE, **{index + 1: index for index in range(CLASSES)}}
    return SemanticFolder(
        "ade20k",
        split,
        class_list(folder / "objectInfo150.txt"),
        folder=folder,
        splits=tuple(LONG),
        images=f"images/{LONG[split]}",
        labels=str(labels.relative_to(folder)),
        values=original if labels.parent.name == "annotations" else None,
    )


@DATASETS.register("ade20k_panoptic")
def ade20k_panoptic(split: str, *, root: str | os.PathLike[str] | None = None) -> CocoPanoptic:
    """ADE20K with 100 things and 50 stuff, from `<root>/ADEChallengeData2016/ade20k_panoptic_{train,val}` and `.json` beside it.

    Mask2Former's preparation scripts make these files.

    Args:
        split: "train" or "val".
        root: the folder that holds "ADEChallengeData2016"; None for the places of the environment.

    Raises:
        UsageError: see CocoPanoptic and find_dataset_folder.
    """
    return ade20k_panoptic_folder(find_dataset_folder("ade20k_panoptic", root, folder=FOLDER), split)


def ade20k_panoptic_folder(folder: Path, split: str) -> CocoPanoptic:
    """A split from the layout of `ade20k_panoptic`."""
    check_split("ade20k_panoptic", split, tuple(LONG))
    candidates = [folder / f"ade20k_panoptic_{name}.json" for name in (split, LONG[split])]
    annotations = first_existing(f"annotations of ade20k_panoptic {split}", *candidates)
    return CocoPanoptic("ade20k_panoptic", split, annotations=annotations, images=folder / "images" / LONG[split])


def class_list(path: Path) -> list[ClassInfo]:
    """The classes from `objectInfo150.txt`, the table that comes with the data: number first, name last, apart by tabs.

    Raises:
        UsageError: not that table.
    """
    try:
        lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:] if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the list of ADE20K's classes {path} cannot be read: {error}") from None
    if [fields[0].strip() for fields in lines] != [str(number) for number in range(1, CLASSES + 1)]:
        raise UsageError(f"{path} is not ADE20K's list of classes: {len(lines)} lines found; expected numbers 1..{CLASSES}, a class each")
    colors = palette(CLASSES)
    return [ClassInfo(fields[-1].strip(), number not in STUFF, colors[number - 1]) for number, fields in enumerate(lines, start=1)]
