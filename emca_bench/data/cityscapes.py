"""Cityscapes: street scenes of European cities, the 19 classes that are evaluated."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from emca_bench.data.base import DATASETS, IGNORE, VOID, ClassInfo, Dataset, Sample, Segment, check_split, fingerprint_of
from emca_bench.data.coco_panoptic import CocoPanoptic
from emca_bench.data.folder import UNREADABLE, SemanticFolder, check_pairs, decode, files_by_stem, find_dataset_folder
from emca_bench.errors import UsageError

SPLITS = ("train", "val")
"""The labels of the test set are secret."""

IMAGE_SUFFIX = "_leftImg8bit.png"
CLASSES = (
    ClassInfo("road", False, (128, 64, 128)),
    ClassInfo("sidewalk", False, (244, 35, 232)),
    ClassInfo("building", False, (70, 70, 70)),
    ClassInfo("wall", False, (102, 102, 156)),
    ClassInfo("fence", False, (190, 153, 153)),
    ClassInfo("pole", False, (153, 153, 153)),
    ClassInfo("traffic light", False, (250, 170, 30)),
    ClassInfo("traffic sign", False, (220, 220, 0)),
    ClassInfo("vegetation", False, (107, 142, 35)),
    ClassInfo("terrain", False, (152, 251, 152)),
    ClassInfo("sky", False, (70, 130, 180)),
    ClassInfo("person", True, (220, 20, 60)),
    ClassInfo("rider", True, (255, 0, 0)),
    ClassInfo("car", True, (0, 0, 142)),
    ClassInfo("truck", True, (0, 0, 70)),
    ClassInfo("bus", True, (0, 60, 100)),
    ClassInfo("train", True, (0, 80, 100)),
    ClassInfo("motorcycle", True, (0, 0, 230)),
    ClassInfo("bicycle", True, (119, 11, 32)),
)
"""In the order of their train ids."""

LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Number of each class in `labelIds` files; the other numbers up to LAST_LABEL are not evaluated."""

LAST_LABEL = 33
LARGEST = 0xFFFF
"""Value of 16 bits."""
INSTANCES = 1000
"""Values of `instanceIds` files from here on are label id times this plus a count; below are label ids."""


@DATASETS.register("cityscapes")
def cityscapes(split: str, *, root: str | os.PathLike[str] | None = None) -> SemanticFolder:
    """Cityscapes with semantic labels, from `<root>/cityscapes/leftImg8bit/<split>/<city>` and `gtFine/<split>/<city>`.

    Read from `*_gtFine_labelTrainIds.png` where there are any, else from `*_gtFine_labelIds.png`.

    Args:
        split: "train" or "val".
        root: the folder that holds "cityscapes"; None for the places of the environment.

    Raises:
        UsageError: see SemanticFolder and find_dataset_folder.
    """
    check_split("cityscapes", split, SPLITS)
    folder = find_dataset_folder("cityscapes", root)
    prepared = next((folder / "gtFine" / split).rglob("*_gtFine_labelTrainIds.png"), None) is not None
    original = dict.fromkeys([*range(LAST_LABEL + 1), IGNORE], IGNORE) | {label: index for index, label in enumerate(LABEL_IDS)}
    return SemanticFolder(
        "cityscapes",
        split,
        CLASSES,
        folder=folder,
        splits=SPLITS,
        images="leftImg8bit/{split}",
        labels="gtFine/{split}",
        image_suffix=IMAGE_SUFFIX,
        label_suffix="_gtFine_labelTrainIds.png" if prepared else "_gtFine_labelIds.png",
        nested=True,
        values=None if prepared else original,
    )


@DATASETS.register("cityscapes_panoptic")
def cityscapes_panoptic(split: str, *, root: str | os.PathLike[str] | None = None) -> Dataset:
    """Cityscapes with 8 things and 11 stuff, from `<root>/cityscapes`.

    Read from `gtFine/cityscapes_panoptic_<split>.json` and the PNGs beside it where `createPanopticImgs` of cityscapesscripts has made
    them, else from `*_gtFine_instanceIds.png` by the same rules.

    Args:
        split: "train" or "val".
        root: the folder that holds "cityscapes"; None for the places of the environment.

    Raises:
        UsageError: see CocoPanoptic, CityscapesInstances and find_dataset_folder.
    """
    check_split("cityscapes_panoptic", split, SPLITS)
    folder = find_dataset_folder("cityscapes_panoptic", root, folder="cityscapes")
    annotations = folder / "gtFine" / f"cityscapes_panoptic_{split}.json"
    if not annotations.is_file():
        return CityscapesInstances(split, folder=folder)
    images = folder / "leftImg8bit" / split
    return CocoPanoptic(
        "cityscapes_panoptic", split, annotations=annotations, images=images, classes=CLASSES, image_file=_image_of_panoptic_entry
    )


def _image_of_panoptic_entry(entry: Mapping[str, Any]) -> str:
    """The entry's own file name is no image's; its id is `<city>_<sequence>_<frame>`."""
    return f"{str(entry['id']).split('_')[0]}/{entry['id']}{IMAGE_SUFFIX}"


class CityscapesInstances(Dataset):
    """Panoptic truth from `instanceIds` PNGs of 16 bits: a region of a thing class without a count is a crowd.

    Args:
        split: one of SPLITS.
        folder: that holds `leftImg8bit` and `gtFine`.

    Raises:
        UsageError: missing files; on reading, a file that cannot be decoded, of another size than its image, or with unknown ids.
    """

    name = "cityscapes_panoptic"
    classes = CLASSES

    def __init__(self, split: str, *, folder: Path) -> None:
        self.split = split
        images, labels, suffix = folder / "leftImg8bit" / split, folder / "gtFine" / split, "_gtFine_instanceIds.png"
        self._images = files_by_stem(f"images of {self.name} {split}", images, IMAGE_SUFFIX, nested=True)
        self._labels = files_by_stem(f"labels of {self.name} {split}", labels, suffix, nested=True)
        check_pairs(self._images, self._labels, f"labels {suffix!r}", labels)
        check_pairs(self._labels, self._images, f"image {IMAGE_SUFFIX!r}", images)
        self._stems = sorted(self._images)

    def __len__(self) -> int:
        return len(self._stems)

    def read(self, index: int) -> Sample:
        """The sample at an index, in the order of names."""
        stem = self._stems[index]
        raw = _decode_16_bit(self._labels[stem])
        # ids are small numbers, so that counting finds them a good deal faster than sorting
        present = np.flatnonzero(np.bincount(raw.ravel(), minlength=1)).astype(np.int32)
        label = np.where(present < INSTANCES, present, present // INSTANCES)
        if present.size and label.max() > LAST_LABEL:
            raise UsageError(
                f"labels {self._labels[stem]} hold the unknown id {present[label.argmax()]}; expected label ids 0..{LAST_LABEL}"
            )
        table = np.full(LAST_LABEL + 1, IGNORE, dtype=np.uint8)
        table[list(LABEL_IDS)] = range(len(LABEL_IDS))
        category, ids = table[label], np.where(table[label] == IGNORE, VOID, present).astype(np.int32)
        segments = tuple(
            Segment(int(id_), int(class_), CLASSES[class_].thing, CLASSES[class_].thing and bool(id_ < INSTANCES))
            for id_, class_ in zip(ids, category, strict=True)
            if class_ != IGNORE
        )
        semantic, panoptic = np.zeros(LARGEST + 1, dtype=np.uint8), np.zeros(LARGEST + 1, dtype=np.int32)
        semantic[present], panoptic[present] = category, ids
        return Sample(stem, decode(self._images[stem], "RGB"), semantic[raw], panoptic[raw], segments)

    def fingerprint(self) -> str:
        """Changes with the names and the sizes of the files."""
        files = [[stem, self._images[stem].stat().st_size, self._labels[stem].stat().st_size] for stem in self._stems]
        return fingerprint_of([self.name, self.split, files])


def _decode_16_bit(path: Path) -> npt.NDArray[np.int32]:
    try:
        with Image.open(path) as picture:
            if not picture.mode.startswith("I") and picture.mode != "L":
                raise UsageError(f"labels {path} have the pixel mode {picture.mode!r}; expected one channel of 16 bits")
            values = np.array(picture).astype(np.int32)
            if values.size and not 0 <= values.min() <= values.max() <= LARGEST:
                raise UsageError(f"labels {path} have values in {values.min()}..{values.max()}; expected one channel of 16 bits")
            return values
    except UsageError:
        raise
    except UNREADABLE as error:
        raise UsageError(f"cannot decode {path} ({path.stat().st_size} bytes): {error}; expected a whole image file") from error
