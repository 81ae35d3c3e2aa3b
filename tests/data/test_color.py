"""Colour jitter against definitions: HSV of the standard library, pixel by pixel, and how often what is drawn."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest

from emca_bench.data import color as C


def picture(rng: np.random.Generator, size: tuple[int, int] = (37, 23)) -> C.Image:
    """Random colours, and among them greys, ties of channels, black and white."""
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    image[0] = image[0, :, :1]
    image[1, :, 1] = image[1, :, 0]
    image[2, ::2], image[2, 1::2] = 0, 255
    image[3, :, 2] = 0
    return image


def by_definition(image: C.Image, *, turn: float = 0.0, factor: float = 1.0) -> np.ndarray:
    """Hue turned by a share of the circle and saturation multiplied, with the standard library's HSV."""
    changed = np.empty(image.shape)
    for place in np.ndindex(image.shape[:2]):
        hue, saturation, value = colorsys.rgb_to_hsv(*(image[place] / 255.0))
        changed[place] = colorsys.hsv_to_rgb((hue + turn) % 1, min(1.0, saturation * factor), value)
    return 255 * changed


def test_hue_and_saturation_are_those_of_hsv(rng: np.random.Generator) -> None:
    image = picture(rng)
    for _ in range(3):
        degrees, factor = rng.uniform(-360, 360), rng.uniform(0, 3)
        assert abs(C.turn_hue(image, degrees) - by_definition(image, turn=degrees / 360)).max() <= 0.51
        assert abs(C.saturate(image, factor) - by_definition(image, factor=factor)).max() <= 0.51


def test_nothing_changes_by_nothing(rng: np.random.Generator) -> None:
    image = picture(rng)
    for same in (C.turn_hue(image, 0), C.turn_hue(image, 720), C.saturate(image, 1), C.linear(image), C.blend(image, np.ones(3))):
        assert (same == image).all()
    assert (C.saturate(image, 0) == image.max(-1, keepdims=True)).all()
    assert C.unchanged(image, rng) is image


def test_strips_have_no_seams(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(rng, (50, 31))
    whole = C.turn_hue(image, 47), C.saturate(image, 1.4)
    for pixels in (1, 100, 31 * 50):
        monkeypatch.setattr(C, "STRIP", pixels)
        assert (C.turn_hue(image, 47) == whole[0]).all()
        assert (C.saturate(image, 1.4) == whole[1]).all()


def test_linear_changes_stay_in_a_byte(rng: np.random.Generator) -> None:
    image = picture(rng)
    for factor, offset in ((1.5, 0.0), (0.5, 0.0), (1.0, 31.7), (1.0, -31.7)):
        expected = np.clip(np.floor(image * factor + offset), 0, 255)
        assert (C.linear(image, factor=factor, offset=offset) == expected).all()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1)])
def test_empty_images_are_left_as_they_are(shape: tuple[int, int], rng: np.random.Generator) -> None:
    image = np.full((*shape, 3), 9, np.uint8)
    assert all(jitter(image, rng).shape == image.shape for jitter in (C.ssd, C.unchanged))


def test_every_part_of_ssd_comes_half_of_the_time_within_its_range(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, float]] = []

    def note(name: str):
        def change(image: C.Image, *values: float, **named: float) -> C.Image:
            kinds = {"factor": "contrast", "offset": "brightness"}
            drawn.extend([(name, value) for value in values] + [(kinds[key], value) for key, value in named.items()])
            return image

        return change

    monkeypatch.setattr(C, "linear", note("linear"))
    monkeypatch.setattr(C, "saturate", note("saturation"))
    monkeypatch.setattr(C, "turn_hue", note("hue"))
    orders, image = set(), picture(rng)
    for _ in range(1000):
        before = len(drawn)
        C.ssd(image, rng)
        orders.add(tuple(name for name, _ in drawn[before:]))
    ranges = {"brightness": (-32, 32), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5), "hue": (-36, 36)}
    for name, (least, greatest) in ranges.items():
        values = [value for kind, value in drawn if kind == name]
        room = 0.05 * (greatest - least)
        assert 400 < len(values) < 600, name
        assert least <= min(values) < least + room
        assert greatest - room < max(values) <= greatest
        assert (name != "hue") or all(value == int(value) and value % 2 == 0 for value in values)
    assert {("brightness", "contrast", "saturation", "hue"), ("brightness", "saturation", "hue", "contrast"), ()} <= orders
    assert all("brightness" not in order[1:] for order in orders)
    assert not any(order.index("hue") < order.index("saturation") for order in orders if {"hue", "saturation"} <= set(order))


def test_simple_keeps_within_its_strength(rng: np.random.Generator) -> None:
    grey = np.full((8, 8, 3), 100, np.uint8)
    means = [C.simple(grey, rng).mean() for _ in range(200)]
    assert 79 <= min(means) < 86
    assert 114 < max(means) <= 121
