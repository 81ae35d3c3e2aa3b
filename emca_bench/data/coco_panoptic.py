"""Reader of the COCO panoptic format: a JSON file of segments beside PNGs whose RGB is the segment id."""

from __future__ import annotations

import colorsys
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emca_bench.data.base import DATASETS, IGNORE, VOID, ClassInfo, Color, Dataset, Sample, Segment, fingerprint_of
from emca_bench.data.folder import dataset_places, decode, find_dataset_folder, first_existing
from emca_bench.errors import UsageError, did_you_mean, listing

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class _Entry:
    """An image, its map of ids and the segments there."""

    name: str
    image: Path
    map: Path
    segments: tuple[Segment, ...]


class CocoPanoptic(Dataset):
    """Semantic and panoptic truth from COCO-panoptic files; segment id = R + 256 G + 65536 B, 0 for none.

    The JSON file and the presence of all other files are checked on opening, pixels when a sample is read. Samples come in the order of
    their names. Crowds keep their class in the semantic map.

    Args:
        name: the dataset's name.
        split: for messages and fingerprint.
        annotations: the JSON file, with "images", "annotations" and "categories".
        images: the folder of images.
        maps: the folder of PNGs; None for the JSON file's name without its suffix.
        classes: names, kinds and colours in the order of their indices; None to take the categories of the file, by id.
        image_file: path below `images` of an entry of "images"; its "file_name" by default.

    Raises:
        UsageError: a file that is missing, torn or of another format; an unknown category; on reading, a map whose ids are not those that
            are listed, or of another size than its image.
    """

    def __init__(
        self,
        name: str,
        split: str,
        *,
        annotations: Path,
        images: Path,
        maps: Path | None = None,
        classes: Sequence[ClassInfo] | None = None,
        image_file: Callable[[Mapping[str, Any]], str] = lambda entry: str(entry["file_name"]),
    ) -> None:
        self.name, self.split, self._json = name, split, annotations
        data, self._hash = _load(annotations)
        maps = annotations.with_suffix("") if maps is None else maps
        try:
            self.classes, known = _categories(data["categories"], classes, annotations)
            named = {entry["id"]: image_file(entry) for entry in data["images"]}
            self._entries = [
                _Entry(
                    Path(named[entry["image_id"]]).stem,
                    images / named[entry["image_id"]],
                    maps / entry["file_name"],
                    tuple(self._segment(segment, known, entry["file_name"]) for segment in entry["segments_info"]),
                )
                for entry in data["annotations"]
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{annotations} is not in COCO's panoptic format: {type(error).__name__}: {error}") from None
        self._entries.sort(key=lambda entry: entry.name)
        self._check_files(images, maps)

    def _segment(self, segment: Mapping[str, Any], known: Mapping[int, int], where: str) -> Segment:
        category = segment["category_id"]
        if category not in known:
            expected = ", ".join(map(str, known))
            raise UsageError(f"{self._json}: segment {segment['id']} of {where!r} has the unknown category {category!r}; known: {expected}")
        index = known[category]
        return Segment(int(segment["id"]), index, self.classes[index].thing, bool(segment.get("iscrowd", 0)))

    def _check_files(self, images: Path, maps: Path) -> None:
        if not self._entries:
            raise UsageError(f"{self._json} lists no annotated image")
        for what, folder, paths in (
            ("image", images, [entry.image for entry in self._entries]),
            ("map", maps, [entry.map for entry in self._entries]),
        ):
            if not folder.is_dir():
                raise UsageError(f"no {what}s of {self.name} {self.split}: the folder {folder} does not exist")
            # one listing of each folder: asking for 100,000 files one by one takes minutes on network disks
            there = {parent: set(os.listdir(parent)) if parent.is_dir() else set() for parent in {path.parent for path in paths}}
            absent = [path for path in paths if path.name not in there[path.parent]]
            if absent:
                more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
                raise UsageError(f"{self._json} names the {what} {absent[0]}{more}, which is not there")

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, index: int) -> Sample:
        """The sample at an index, in the order of names."""
        entry = self._entries[index]
        channels = decode(entry.map, "RGB").astype(np.int32)
        ids = channels[..., 0] + 256 * channels[..., 1] + 65536 * channels[..., 2]
        present = np.unique(ids)
        self._check_ids(set(present.tolist()) - {VOID}, entry)
        category = {VOID: IGNORE, **{segment.id: segment.category for segment in entry.segments}}
        table = np.array([category[segment] for segment in present.tolist()], dtype=np.uint8)
        # faster than the inverse of np.unique, which sorts all pixels
        places = np.searchsorted(present, ids)
        return Sample(entry.name, decode(entry.image, "RGB"), table[places], ids, entry.segments)

    def _check_ids(self, found: set[int], entry: _Entry) -> None:
        listed = {segment.id for segment in entry.segments}
        if len(listed) != len(entry.segments) or VOID in listed:
            raise UsageError(f"{self._json} lists a segment of {entry.map.name!r} twice, or one with the id {VOID}, which means none")
        if found - listed:
            raise UsageError(f"map {entry.map} has pixels of segment {min(found - listed)}, which {self._json} does not list")
        if listed - found:
            raise UsageError(f"{self._json} lists segment {min(listed - found)}, of which map {entry.map} has no pixel")

    def fingerprint(self) -> str:
        """Changes with the annotations and with the names and sizes of the other files."""
        files = [[entry.name, entry.image.stat().st_size, entry.map.stat().st_size] for entry in self._entries]
        return fingerprint_of([self.name, self.split, self._hash, files])


def _load(path: Path) -> tuple[dict[str, Any], str]:
    """The JSON object of a file and the hash of its bytes."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    try:
        data = json.loads(content)
    except ValueError as error:
        raise UsageError(f"{path} ({len(content)} bytes) is not valid JSON: {error}; expected a whole file") from None
    absent = [key for key in ("images", "annotations", "categories") if not isinstance(data, dict) or key not in data]
    if absent:
        raise UsageError(f"{path} is not in COCO's panoptic format: it lacks {listing(absent)}")
    return data, hashlib.sha256(content).hexdigest()


def _categories(
    entries: Sequence[Mapping[str, Any]], classes: Sequence[ClassInfo] | None, path: Path
) -> tuple[tuple[ClassInfo, ...], dict[int, int]]:
    """The classes, and the class index of each category id; classes that are not given stand in the order of ids, not of a split's list."""
    if classes is None:
        entries = sorted(entries, key=lambda entry: int(entry["id"]))
        colors = palette(len(entries))
        classes = [
            ClassInfo(str(entry["name"]), bool(entry["isthing"]), _color(entry.get("color"), color))
            for entry, color in zip(entries, colors, strict=True)
        ]
        ids = {entry["id"]: index for index, entry in enumerate(entries)}
    else:
        index_of = {info.name: index for index, info in enumerate(classes)}
        for entry in entries:
            if entry["name"] not in index_of:
                raise UsageError(
                    f"{path} has the category {entry['name']!r}{did_you_mean(entry['name'], index_of)}; known: {listing(index_of)}"
                )
        ids = {entry["id"]: index_of[str(entry["name"])] for entry in entries}
    if not 0 < len(classes) <= IGNORE:
        raise UsageError(f"{path} has {len(classes)} categories; expected 1..{IGNORE}")
    return tuple(classes), ids


def _color(found: Sequence[int] | None, spare: Color) -> Color:
    return (int(found[0]), int(found[1]), int(found[2])) if found else spare


def palette(count: int) -> list[Color]:
    """Colours that neighbours in the list can be told apart by: hues a golden section apart, in three strengths."""
    strengths = ((0.62, 0.80), (0.45, 0.93), (0.80, 0.58))
    found = [colorsys.hsv_to_rgb(0.618033988749895 * index % 1, *strengths[index % 3]) for index in range(count)]
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in found]


def split_folder(folder: Path, name: str, split: str, *, classes: Sequence[ClassInfo] | None = None) -> CocoPanoptic:
    """A split from `images/<split>`, `panoptic_<split>.json` and `panoptic_<split>/` of a folder; see CocoPanoptic."""
    return CocoPanoptic(name, split, annotations=folder / f"panoptic_{split}.json", images=folder / "images" / split, classes=classes)


@DATASETS.register("coco")
def coco(split: str, *, root: str | os.PathLike[str] | None = None) -> CocoPanoptic:
    """COCO panoptic, 80 things and 53 stuff, from `<root>/coco/{train2017,val2017}`, `annotations/panoptic_<split>2017.json` and PNGs.

    The folder of PNGs is `panoptic_<split>2017` beside the images or beside the JSON file, which itself may lie beside the images.

    Args:
        split: "train" or "val"; the labels of COCO's test set are secret.
        root: the folder that holds "coco"; None for the places of the environment.

    Raises:
        UsageError: see CocoPanoptic and find_dataset_folder.
    """
    return coco_folder(find_dataset_folder("coco", root), split)


def coco_folder(folder: Path, split: str) -> CocoPanoptic:
    """A split from COCO's own layout; see `coco`."""
    if split not in SPLITS[:2]:
        raise UsageError(f"unknown split {split!r} of dataset 'coco'{did_you_mean(split, SPLITS[:2])}; known: train, val")
    stem = f"panoptic_{split}2017"
    annotations = first_existing(f"annotations of coco {split}", folder / "annotations" / f"{stem}.json", folder / f"{stem}.json")
    maps = first_existing(f"maps of coco {split}", folder / stem, folder / "annotations" / stem)
    return CocoPanoptic("coco", split, annotations=annotations, images=folder / f"{split}2017", maps=maps)


def own_dataset(name: str) -> Callable[..., Dataset] | None:
    """A factory for a folder of one's own in the layout of `split_folder`, below a place of the environment; None where there is none.

    The name is the folder's. Its splits are those with a JSON file.
    """
    folders = [place.expanduser() / name for place in dataset_places()]
    folder = next((folder for folder in folders if any((folder / f"panoptic_{split}.json").is_file() for split in SPLITS)), None)
    if folder is None or Path(name).name != name:
        return None
    found = folder

    def factory(split: str) -> Dataset:
        return split_folder(found, name, split)

    return factory
