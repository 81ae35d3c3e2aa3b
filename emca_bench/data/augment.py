"""Training augmentation as Mask2Former does it: scale jitter, crop to a fixed size with a limit on one category, colour jitter, flip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from emca_bench.data.base import IGNORE, IMAGE_PADDING, VOID, Sample, Segment
from emca_bench.data.color import COLOR_JITTERS
from emca_bench.errors import UsageError, did_you_mean

Labels = TypeVar("Labels", npt.NDArray[np.uint8], npt.NDArray[np.int32])

Window = tuple[slice, slice]
"""Rows and columns of a crop."""

SCALE_DRAWS = ("log", "tenths")

LONGEST_SIDE = 4
"""Of a scaled image, in short sides at scale 1: the published MAX_SIZE_TRAIN."""

CROP_TRIES = 10
"""Crops that are drawn at most, to find one that no category fills."""


@dataclass(frozen=True)
class Augmentation:
    """A random transform of a sample, driven by the generator it is given and by nothing else.

    Attributes:
        size: (H, W) of the result in pixels; what the scaled image does not fill, at the bottom and the right, is padding.
        scale: least and greatest scale.
        scale_draw: "log": drawn uniformly in its logarithm. "tenths": one of the tenths from least to greatest, as published.
        short_side: the shorter side in pixels that a scale of 1 gives, the longer one being LONGEST_SIDE times that at most; 0 for the
            image's own.
        category_area: a crop of which one category has this share or more, of the pixels with a label, is drawn anew, CROP_TRIES times
            in all; 1 takes the first one.
        flip: whether to flip horizontally half of the time.
        color: name in `COLOR_JITTERS`.

    Raises:
        UsageError: a size, a range or a name that cannot be used.
    """

    size: Sequence[int]
    scale: Sequence[float] = (0.5, 2.0)
    scale_draw: str = "log"
    short_side: int = 0
    category_area: float = 1.0
    flip: bool = True
    color: str = "simple"

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise UsageError(f"augmentation size is {self.size!r}; expected (H, W) of at least 1 pixel")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise UsageError(f"augmentation scale is {self.scale!r}; expected (least, greatest) with 0 < least <= greatest")
        if self.short_side < 0:
            raise UsageError(f"augmentation short_side is {self.short_side!r}; expected 0 or the shorter side in pixels")
        if not 0 < self.category_area <= 1:
            raise UsageError(f"augmentation category_area is {self.category_area!r}; expected a share in 0..1, 0 excluded, 1 for no limit")
        for name, found, known in (("color", self.color, COLOR_JITTERS), ("scale_draw", self.scale_draw, SCALE_DRAWS)):
            if found not in known:
                raise UsageError(f"augmentation {name} is {found!r}{did_you_mean(found, known)}; expected one of {', '.join(known)}")

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The transformed sample, of size `self.size`, without the segments that left the picture."""
        # which segments are left is asked once, at the end: finding the ids of a map is the dearest part of a step
        segments, sample = sample.segments, replace(sample, segments=())
        size = scaled_size(sample.size, self._scale(sample.size, rng))
        sample = part_of_resized(sample, size, self._window(sample.semantic, size, rng))
        if self.flip and rng.random() < 0.5:
            sample = flip(sample)
        sample = replace(sample, image=COLOR_JITTERS[self.color](sample.image, rng))
        sample = pad(sample, self.size)
        return replace(sample, segments=_present(segments, sample.panoptic))

    def _scale(self, size: tuple[int, int], rng: np.random.Generator) -> float:
        """Of the image's own size."""
        if self.scale_draw == "log":
            scale = float(np.exp(rng.uniform(*np.log(self.scale))))
        else:
            least, greatest = (round(10 * bound) for bound in self.scale)
            scale = int(rng.integers(least, greatest, endpoint=True)) / 10
        if not self.short_side:
            return scale
        return min(scale * self.short_side / min(size), LONGEST_SIDE * self.short_side / max(size))

    def _window(self, semantic: npt.NDArray[np.uint8], size: tuple[int, int], rng: np.random.Generator) -> Window:
        """A crop of a label map that is scaled to a size; the last one drawn where none has enough categories."""
        for _ in range(CROP_TRIES):
            window = window_at(size, self.size, (rng.random(), rng.random()))
            if self.category_area == 1 or largest_share(nearest(semantic, size, window)) < self.category_area:
                break
        return window


def largest_share(semantic: npt.NDArray[np.uint8]) -> float:
    """Of the pixels with a label, the share of the commonest one; 1 where there are none."""
    counts = np.bincount(semantic.ravel(), minlength=IGNORE + 1)[:IGNORE]
    return float(counts.max() / counts.sum()) if counts.any() else 1.0


def window_at(size: Sequence[int], wanted: Sequence[int], place: tuple[float, float]) -> Window:
    """A window of at most `wanted` (H, W) pixels at a place in 0..1 of the room there is, in y and x."""
    rooms = [max(0, side - most) for side, most in zip(size, wanted, strict=True)]
    top, left = (min(int(at * (room + 1)), room) for at, room in zip(place, rooms, strict=True))
    return slice(top, top + wanted[0]), slice(left, left + wanted[1])


def scaled_size(size: Sequence[int], scale: float) -> tuple[int, int]:
    """(H, W) times a factor, a pixel at least."""
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def part_of_resized(sample: Sample, size: tuple[int, int], window: Window) -> Sample:
    """What a window shows of the sample scaled to (H, W): the image bilinearly (antialiased), the labels by nearest neighbour.

    Only that part is made: of a large picture it is a fraction of the work.
    """
    (top, bottom), (left, right) = (part.indices(side)[:2] for part, side in zip(window, size, strict=True))
    down, across = (old / new for old, new in zip(sample.size, size, strict=True))
    box = (left * across, top * down, right * across, bottom * down)
    picture = Image.fromarray(sample.image).resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=box)
    panoptic = None if sample.panoptic is None else nearest(sample.panoptic, size, window)
    return _with_maps(sample, np.array(picture), nearest(sample.semantic, size, window), panoptic)


def nearest(labels: Labels, size: tuple[int, int], window: Window) -> Labels:
    """What a window shows of labels [h, w] scaled to (H, W): the nearest neighbours of the pixels' centres."""
    rows, columns = (((2 * np.arange(new) + 1) * old // (2 * new))[part] for new, old, part in zip(size, labels.shape, window, strict=True))
    return labels[rows[:, None], columns]


def flip(sample: Sample) -> Sample:
    """The sample mirrored left to right."""
    panoptic = None if sample.panoptic is None else sample.panoptic[:, ::-1]
    return _with_maps(sample, sample.image[:, ::-1], sample.semantic[:, ::-1], panoptic)


def pad(sample: Sample, size: Sequence[int]) -> Sample:
    """The sample filled up to (H, W) pixels at the bottom and the right with IMAGE_PADDING, IGNORE and VOID."""
    bottom, right = ((0, max(0, wanted - side)) for side, wanted in zip(sample.size, size, strict=True))
    image = np.pad(sample.image, (bottom, right, (0, 0)), constant_values=IMAGE_PADDING)
    panoptic = None if sample.panoptic is None else np.pad(sample.panoptic, (bottom, right), constant_values=VOID)
    return _with_maps(sample, image, np.pad(sample.semantic, (bottom, right), constant_values=IGNORE), panoptic)


def _with_maps(
    sample: Sample, image: npt.NDArray[np.uint8], semantic: npt.NDArray[np.uint8], panoptic: npt.NDArray[np.int32] | None
) -> Sample:
    return Sample(sample.name, image, semantic, panoptic, _present(sample.segments, panoptic))


def _present(segments: tuple[Segment, ...], panoptic: npt.NDArray[np.int32] | None) -> tuple[Segment, ...]:
    """The segments of which a map has pixels."""
    if panoptic is None or not segments:
        return segments
    present = set(np.unique(panoptic).tolist())
    return tuple(segment for segment in segments if segment.id in present)
