"""Random changes of an image's colours, under the names that recipes use."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]
"""[H, W, 3], RGB."""

Plane = npt.NDArray[np.floating]
Planes = tuple[Plane, ...]

STRIP = 16384
"""Pixels that are changed together."""

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)

SIMPLE_STRENGTH = 0.2
"""Greatest relative change of brightness, contrast and saturation of "simple"."""

SSD_BRIGHTNESS = 32.0
SSD_FACTORS = (0.5, 1.5)
SSD_HUE_STEPS = 18
SSD_HUE_STEP = 2.0
"""In degrees: hue is stored in a byte as half of them."""


def unchanged(image: Image, rng: np.random.Generator) -> Image:
    """The image as it is."""
    return image


def simple(image: Image, rng: np.random.Generator) -> Image:
    """Brightness, contrast and saturation, each multiplied by a factor drawn evenly within SIMPLE_STRENGTH around 1."""
    return blend(image, 1 + SIMPLE_STRENGTH * rng.uniform(-1, 1, 3))


def ssd(image: Image, rng: np.random.Generator) -> Image:
    """The colours of SSD (Liu et al. 2016, section 3.6 and its code), as Mask2Former's recipes have them.

    Brightness first; contrast before or after saturation and hue, as a coin falls; each of the four is left out half of the time.
    """
    between = (_random_saturation, _random_hue)
    steps = (_random_contrast, *between) if _heads(rng) else (*between, _random_contrast)
    for step in (_random_brightness, *steps):
        if _heads(rng):
            image = step(image, rng)
    return image


COLOR_JITTERS: dict[str, Callable[[Image, np.random.Generator], Image]] = {"none": unchanged, "simple": simple, "ssd": ssd}


def blend(image: Image, factors: npt.NDArray[np.float64]) -> Image:
    """Brightness, contrast (about the mean) and saturation (about the luma) multiplied by three factors, in this order."""
    brightness, contrast, saturation = (np.float32(factor) for factor in factors)
    pixels = image.astype(np.float32) * brightness
    pixels = pixels.mean() * (1 - contrast) + pixels * contrast
    pixels = (pixels @ LUMA)[..., None] * (1 - saturation) + pixels * saturation
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def linear(image: Image, *, factor: float = 1.0, offset: float = 0.0) -> Image:
    """Every value times a factor plus an offset, kept within 0..255, the fraction cut off as published."""
    table = np.clip(np.arange(256) * factor + offset, 0, 255).astype(np.uint8)
    return table[image]


def saturate(image: Image, factor: float) -> Image:
    """Saturation of HSV times a factor, 1 at most; value and hue stay."""

    def change(planes: Planes, value: Plane, chroma: Plane) -> Iterable[Plane]:
        # a saturation of 1 is where the least channel is 0
        limit = np.minimum(np.float32(factor), value / np.maximum(chroma, 1))
        return (value - (value - plane) * limit for plane in planes)

    return _in_strips(image, change)


def turn_hue(image: Image, degrees: float) -> Image:
    """Hue of HSV turned by an angle; value and saturation stay, and so do greys."""

    def change(planes: Planes, value: Plane, chroma: Plane) -> Iterable[Plane]:
        red, green, blue = planes
        reddish, greenish = value == red, value == green
        sector = np.where(reddish, green - blue, np.where(greenish, blue - red, red - green)) / np.maximum(chroma, 1)
        sector += np.where(reddish, 0, np.where(greenish, 2, 4)) + degrees / 60
        return (value - chroma * _depth(sector + first) for first in (5, 3, 1))

    return _in_strips(image, change)


def _depth(sector: Plane) -> Plane:
    """How far a channel lies below the value, in 0..1 of the chroma: a trapezoid over the six sectors of the circle."""
    return np.clip(2 - np.abs(sector - 6 * np.floor(sector / 6) - 2), 0, 1)


def _in_strips(image: Image, change: Callable[[Planes, Plane, Plane], Iterable[Plane]]) -> Image:
    """New channels from old ones, their value and their chroma; strip by strip, so that whatever is made on the way stays in the cache."""
    changed = np.empty_like(image)
    height = max(1, STRIP // max(1, image.shape[1]))
    for top in range(0, len(image), height):
        planes = tuple(image[top : top + height, :, channel].astype(np.float32) for channel in range(3))
        value = np.maximum(np.maximum(planes[0], planes[1]), planes[2])
        chroma = value - np.minimum(np.minimum(planes[0], planes[1]), planes[2])
        for channel, plane in enumerate(change(planes, value, chroma)):
            # values are within 0..255, so that a half and a cut round them
            changed[top : top + height, :, channel] = plane + np.float32(0.5)
    return changed


def _random_brightness(image: Image, rng: np.random.Generator) -> Image:
    return linear(image, offset=rng.uniform(-SSD_BRIGHTNESS, SSD_BRIGHTNESS))


def _random_contrast(image: Image, rng: np.random.Generator) -> Image:
    return linear(image, factor=rng.uniform(*SSD_FACTORS))


def _random_saturation(image: Image, rng: np.random.Generator) -> Image:
    return saturate(image, rng.uniform(*SSD_FACTORS))


def _random_hue(image: Image, rng: np.random.Generator) -> Image:
    return turn_hue(image, SSD_HUE_STEP * int(rng.integers(-SSD_HUE_STEPS, SSD_HUE_STEPS, endpoint=True)))


def _heads(rng: np.random.Generator) -> bool:
    return bool(rng.random() < 0.5)
