"""Generated scenes: the dataset that needs no download."""

from __future__ import annotations

from collections.abc import Sequence

from emca_bench.data.base import DATASETS, Dataset, Sample, check_split, fingerprint_of
from emca_bench.data.dice import Dice
from emca_bench.data.scene_layout import CLASSES, draw_scene
from emca_bench.data.scene_render import render
from emca_bench.errors import UsageError

VERSION = 1
"""Raised by any change that changes a pixel or a label of any scene."""

COUNTS = {"train": 2048, "val": 256, "test": 256}
SMALLEST, LARGEST = 64, 1024


@DATASETS.register("scenes")
class Scenes(Dataset):
    """Scenes of 4 stuff and 6 thing classes with semantic and panoptic truth, each a pure function of (split, seed, index, size).

    Stuff is told apart by texture, things by shape; colours, light, noise and blur are random per image and carry no class.
    A disc is a "nucleus" if a ring encloses it and a "disc" otherwise. Disc and gap look the same in both cases, and the gap is wider than
    the disc's radius: the class needs context from beyond it.
    No class changes under a horizontal flip or a change of scale.

    Args:
        split: "train", "val" or "test"; the splits are independent streams.
        size: (H, W) in pixels, each in SMALLEST..LARGEST; content scales with the shorter side.
        count: number of scenes; None for the split's entry in COUNTS. Scene i does not depend on it.
        seed: another seed gives another dataset.

    Raises:
        UsageError: an option outside of its range.
    """

    name = "scenes"
    classes = CLASSES

    def __init__(self, split: str, *, size: Sequence[int] = (128, 128), count: int | None = None, seed: int = 0) -> None:
        check_split(self.name, split, tuple(COUNTS))
        self.split = split
        self.size = _checked_size(size)
        self.count = COUNTS[split] if count is None else _checked_integer("count", count, 1)
        self.seed = _checked_integer("seed", seed, 0)

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Sample:
        """The scene at an index, generated afresh."""
        content, noise = (Dice(VERSION, list(COUNTS).index(self.split), self.seed, index, stream) for stream in range(2))
        return render(f"{self.split}_{index:06d}", draw_scene(self.size, content), noise)

    def fingerprint(self) -> str:
        """Changes with the generator's version and with every option."""
        return fingerprint_of([self.name, VERSION, self.split, self.size, self.count, self.seed])


def _checked_size(size: Sequence[int]) -> tuple[int, int]:
    sides = tuple(size) if isinstance(size, Sequence) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and SMALLEST <= side <= LARGEST for side in sides):
        raise UsageError(f"option 'size' of dataset 'scenes' is {size!r}; expected two integers (H, W) in {SMALLEST}..{LARGEST}")
    return sides[0], sides[1]


def _checked_integer(option: str, value: int, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"option {option!r} of dataset 'scenes' is {value!r}; expected an integer of at least {least}")
    return value
