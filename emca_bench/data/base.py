"""What a dataset is: named classes, samples with semantic and panoptic truth, and the registry of datasets."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from emca_bench.errors import UsageError, did_you_mean, listing
from emca_bench.registry import Registry

IGNORE = 255
"""Semantic value of a pixel that is neither trained on nor scored."""

VOID = 0
"""Panoptic id of a pixel that belongs to no segment."""

IMAGE_PADDING = 128
"""Image value below which padding hides: mid-grey, as Mask2Former pads."""

Color = tuple[int, int, int]


@dataclass(frozen=True)
class ClassInfo:
    """A class of a dataset; its position in `Dataset.classes` is its index in the labels.

    Attributes:
        name: the dataset's own name of the class.
        thing: True for countable objects, False for stuff.
        color: RGB in 0..255, for overlays.
    """

    name: str
    thing: bool
    color: Color


@dataclass(frozen=True)
class Segment:
    """One panoptic segment of a sample: its id in the panoptic map, its class index, and whether that class is a thing.

    `iscrowd` marks things that were not told apart: they are no target of training, and metrics neither ask for them nor blame what
    lies inside.
    """

    id: int
    category: int
    thing: bool
    iscrowd: bool = False


@dataclass(frozen=True, eq=False)
class Sample:
    """An image with its truth; the pixels of all maps correspond one to one.

    Attributes:
        name: unique within the split.
        image: uint8 [H, W, 3], RGB.
        semantic: uint8 [H, W], class index or IGNORE.
        panoptic: int32 [H, W], segment ids with VOID for no segment; None where the dataset has semantic labels only.
        segments: one entry per id of `panoptic`.

    Raises:
        UsageError: a map of another size than the image.
    """

    name: str
    image: npt.NDArray[np.uint8]
    semantic: npt.NDArray[np.uint8]
    panoptic: npt.NDArray[np.int32] | None = None
    segments: tuple[Segment, ...] = ()

    def __post_init__(self) -> None:
        if self.image.ndim != 3 or self.image.shape[2] != 3:
            raise UsageError(f"image of {self.name!r} has shape {list(self.image.shape)}; expected [H, W, 3]")
        for kind, labels in (("semantic", self.semantic), ("panoptic", self.panoptic)):
            if labels is not None and labels.shape != self.size:
                found = "x".join(map(str, labels.shape))
                raise UsageError(f"{kind} labels of {self.name!r} are {found} (HxW); expected {self.size[0]}x{self.size[1]} as its image")

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.image.shape[0], self.image.shape[1]


class Dataset(ABC):
    """One split of a dataset: a fixed sequence of samples.

    Attributes:
        name: the name it is registered under.
        split: which split this is.
        classes: class `i` of the labels is `classes[i]`.
    """

    name: str
    split: str
    classes: tuple[ClassInfo, ...]

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def read(self, index: int) -> Sample:
        """The sample at an index in 0..len-1, read or generated afresh."""

    @abstractmethod
    def fingerprint(self) -> str:
        """16 hex digits that change when the data changes; the place where it lies does not count."""

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {self.name} {self.split}, which has {len(self)}")
        return self.read(index % len(self))

    def __iter__(self) -> Iterator[Sample]:
        return (self.read(index) for index in range(len(self)))


DATASETS: Registry[Callable[..., Dataset]] = Registry("dataset")
"""Factories `f(split, *, option=default, ...) -> Dataset`; a factory's keyword-only parameters are the options it knows."""


def check_split(name: str, split: str, known: tuple[str, ...]) -> None:
    """Raise UsageError unless `split` is one of the known splits of dataset `name`."""
    if split not in known:
        raise UsageError(f"unknown split {split!r} of dataset {name!r}{did_you_mean(split, known)}; known: {listing(known)}")


def fingerprint_of(identity: Any) -> str:
    """16 hex digits of a value made of JSON's types."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
