"""Training augmentation as Mask2Former does it: scale jitter, crop to a fixed size, flip, colour jitter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from emca_bench.data.base import IGNORE, IMAGE_PADDING, VOID, Sample, Segment
from emca_bench.errors import UsageError

Labels = TypeVar("Labels", npt.NDArray[np.uint8], npt.NDArray[np.int32])

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True)
class Augmentation:
    """A random transform of a sample, driven by the generator it is given and by nothing else.

    Attributes:
        size: (H, W) of the result in pixels; what the scaled image does not fill, at the bottom and the right, is padding.
        scale: least and greatest scale; drawn uniformly in its logarithm.
        short_side: the shorter side in pixels that a scale of 1 gives; 0 for the image's own.
        flip: whether to flip horizontally half of the time.
        color: greatest relative change of brightness, contrast and saturation, each drawn uniformly; 0 for none.

    Raises:
        UsageError: a size or a range that cannot be used.
    """

    size: Sequence[int]
    scale: Sequence[float] = (0.5, 2.0)
    short_side: int = 0
    flip: bool = True
    color: float = 0.2

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise UsageError(f"augmentation size is {self.size!r}; expected (H, W) of at least 1 pixel")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise UsageError(f"augmentation scale is {self.scale!r}; expected (least, greatest) with 0 < least <= greatest")
        if self.short_side < 0:
            raise UsageError(f"augmentation short_side is {self.short_side!r}; expected 0 or the shorter side in pixels")
        if not 0 <= self.color < 1:
            raise UsageError(f"augmentation color is {self.color!r}; expected a number in 0..1, 1 excluded")

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The transformed sample, of size `self.size`, without the segments that left the picture."""
        scale = float(np.exp(rng.uniform(*np.log(self.scale))))
        if self.short_side:
            scale *= self.short_side / min(sample.size)
        # which segments are left is asked once, at the end: finding the ids of a map is the dearest part of a step
        segments, sample = sample.segments, replace(sample, segments=())
        sample = crop(resize(sample, scale), self.size, (rng.random(), rng.random()))
        if self.flip and rng.random() < 0.5:
            sample = flip(sample)
        if self.color:
            sample = replace(sample, image=jitter_color(sample.image, 1 + self.color * rng.uniform(-1, 1, 3)))
        sample = pad(sample, self.size)
        return replace(sample, segments=_present(segments, sample.panoptic))


def resize(sample: Sample, scale: float) -> Sample:
    """The sample scaled by a factor: the image bilinearly (antialiased), the labels by nearest neighbour."""
    H, W = (max(1, round(side * scale)) for side in sample.size)
    image = np.array(Image.fromarray(sample.image).resize((W, H), Image.Resampling.BILINEAR))
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip((H, W), sample.size, strict=True))
    panoptic = None if sample.panoptic is None else sample.panoptic[rows[:, None], columns]
    return _with_maps(sample, image, sample.semantic[rows[:, None], columns], panoptic)


def crop(sample: Sample, size: Sequence[int], place: tuple[float, float]) -> Sample:
    """The part of at most (H, W) pixels at a place in 0..1 of the room there is, in y and x."""
    window = []
    for side, wanted, at in zip(sample.size, size, place, strict=True):
        start = min(int(at * (max(0, side - wanted) + 1)), max(0, side - wanted))
        window.append(slice(start, start + wanted))
    rows, columns = window
    panoptic = None if sample.panoptic is None else sample.panoptic[rows, columns]
    return _with_maps(sample, sample.image[rows, columns], sample.semantic[rows, columns], panoptic)


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


def jitter_color(image: npt.NDArray[np.uint8], factors: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Image [H, W, 3] with brightness, contrast and saturation multiplied by three factors, in this order."""
    brightness, contrast, saturation = (np.float32(factor) for factor in factors)
    pixels = image.astype(np.float32) * brightness
    pixels = pixels.mean() * (1 - contrast) + pixels * contrast
    pixels = (pixels @ LUMA)[..., None] * (1 - saturation) + pixels * saturation
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


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
