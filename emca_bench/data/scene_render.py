"""From the content of a generated scene to pixels and truth, in integer arithmetic throughout.

Distances to outlines are signed, positive inside, in 1/SUBPIXEL pixel; coverages are in 0..SUBPIXEL.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from emca_bench.data.base import IGNORE, VOID, Color, Sample, Segment
from emca_bench.data.dice import Dice
from emca_bench.data.scene_layout import CLASSES, FIXED, ONE, SINE, SUBPIXEL, TURN, Layer, Light, Scene, Thing, category_of, ring_width

Ints = npt.NDArray[np.int32]

SINES = np.array(SINE, dtype=np.int32)
MIN_VISIBLE_PIXELS = 12
SHADOW = 4 * SUBPIXEL

# shape: (number of outline lines, their distance from the centre in units of the radius, lines a point may lie beyond)
POLYGONS = {"triangle": (3, math.cos(math.pi / 3), 0), "square": (4, math.cos(math.pi / 4), 0), "star": (5, math.cos(2 * math.pi / 5), 1)}


def render(name: str, scene: Scene, dice: Dice) -> Sample:
    """Draw a scene; `dice` gives the noise.

    Stuff is one segment per class. A thing with fewer than MIN_VISIBLE_PIXELS visible pixels is IGNORE and VOID.
    """
    H, W = scene.size
    y, x = np.arange(H, dtype=np.int32)[:, None] * SUBPIXEL + SUBPIXEL // 2, np.arange(W, dtype=np.int32)[None] * SUBPIXEL + SUBPIXEL // 2
    back, *others = scene.layers
    image = _texture_image(back, y, x)
    stuff = np.full((H, W), back.category, dtype=np.uint8)
    for layer in others:
        inside = _layer_distance(layer, scene, y, x)
        _shade(image, inside)
        _blend(image, _texture_image(layer, y, x), _coverage(inside))
        stuff[inside >= 0] = layer.category
    owner = np.full((H, W), -1, dtype=np.int32)
    for i, thing in enumerate(scene.things):
        window = _window(thing, H, W)
        inside = thing_distance(thing, y[window[0]], x[:, window[1]])
        _shade(image[:, *window], inside)
        _blend(image[:, *window], _planes(thing.color), _coverage(inside))
        owner[window][inside >= 0] = i
    semantic, panoptic, segments = _truth(scene, stuff, owner)
    return Sample(name, _expose(image, scene.light, dice), semantic, panoptic, segments)


def thing_distance(thing: Thing, y: Ints, x: Ints) -> Ints:
    """Signed distance [h, w] from points at y [h, 1] and x [1, w] to the outline of a thing."""
    if thing.shape in POLYGONS:
        lines, apothem, beyond = POLYGONS[thing.shape]
        reach = thing.radius * round(ONE * apothem) >> FIXED
        angles = [thing.angle + TURN * i // lines for i in range(lines)]
        return np.sort(np.stack([reach - _along(angle, y - thing.y, x - thing.x) for angle in angles]), axis=0)[beyond]
    squared = (y - thing.y) ** 2 + (x - thing.x) ** 2
    outer = _circle_distance(thing.radius, squared)
    if thing.shape == "disc":
        return outer
    return np.minimum(outer, -_circle_distance(thing.radius - ring_width(thing.radius), squared))


def _circle_distance(radius: int, squared: Ints) -> Ints:
    """Exact at the circle, and of the right sign everywhere; a square root would be neither integer nor faster."""
    return (radius * radius - squared) // (2 * radius)


def _along(angle: int, y: Ints, x: Ints) -> Ints:
    """Coordinate [h, w] of points along a direction, counted from the x axis towards the y axis."""
    return (y * SINE[angle % TURN] + x * SINE[(angle + TURN // 4) % TURN]) >> FIXED


def _layer_distance(layer: Layer, scene: Scene, y: Ints, x: Ints) -> Ints:
    H, W = scene.size
    y, x = y - H * SUBPIXEL // 2, x - W * SUBPIXEL // 2
    amplitude, length, phase = layer.wave
    turns = _along(scene.direction + TURN // 4, y, x) * TURN // length + phase
    wave = amplitude * (SINES[turns & (TURN - 1)] * 2 + SINES[(2 * turns + phase) & (TURN - 1)]) // (3 * ONE)
    return _along(scene.direction, y, x) - layer.edge + wave


def _texture_image(layer: Layer, y: Ints, x: Ints) -> Ints:
    """RGB [3, H, W] of a layer's two colours in the pattern of its class."""
    first, second = map(_planes, layer.colors)
    return first + ((second - first) * _coverage(_texture_distance(layer, y, x)) >> 4)


def _texture_distance(layer: Layer, y: Ints, x: Ints) -> Ints:
    """Signed distance [H, W] to the edges of a texture's pattern."""
    v = _along(layer.tilt + TURN // 4, y, x) + layer.phase[0]
    u = _along(layer.tilt, y, x) + layer.phase[1]
    period = layer.period
    name = CLASSES[layer.category].name
    if name == "bands":
        return _zigzag(v, period)
    if name == "columns":
        return _zigzag(u, period)
    if name == "checker":
        a, b = _zigzag(v, 2 * period), _zigzag(u, 2 * period)
        return np.where((a < 0) == (b < 0), np.int32(1), np.int32(-1)) * np.minimum(np.abs(a), np.abs(b))
    near = _zigzag(v, period) + period // 4
    across = _zigzag(u, period) + period // 4
    return _circle_distance(period * 3 // 10, near**2 + across**2)


def _zigzag(position: Ints, period: int) -> Ints:
    """A triangle wave of slope 1: from -period/4 up to period/4 and back."""
    return np.abs(position - position // period * period - period // 2) - period // 4


def _planes(color: Color) -> Ints:
    return np.array(color, dtype=np.int32)[:, None, None]


def _coverage(inside: Ints) -> Ints:
    return np.clip(inside + SUBPIXEL // 2, 0, SUBPIXEL)


def _blend(image: Ints, over: Ints, covered: Ints) -> None:
    image += (over - image) * covered >> 4


def _shade(image: Ints, inside: Ints) -> None:
    """Darken what lies just outside an outline, as under a sheet of paper."""
    image -= image * np.clip(inside + SHADOW, 0, SHADOW) >> 7


def _window(thing: Thing, H: int, W: int) -> tuple[slice, slice]:
    """The pixels that a thing or its shadow may touch."""
    reach = thing.radius + SHADOW + SUBPIXEL
    spans = [(max(0, (c - reach) // SUBPIXEL), min(n, -(-(c + reach) // SUBPIXEL))) for c, n in ((thing.y, H), (thing.x, W))]
    return slice(*spans[0]), slice(*spans[1])


def _truth(scene: Scene, stuff: npt.NDArray[np.uint8], owner: Ints) -> tuple[npt.NDArray[np.uint8], Ints, tuple[Segment, ...]]:
    """Semantic map, panoptic map and segments, from the stuff [H, W] and the index [H, W] of the front thing, -1 for none.

    Ids count from 1, stuff before things.
    """
    segments: list[Segment] = []
    stuff_pixels = np.bincount(stuff[owner < 0], minlength=len(CLASSES))
    thing_pixels = np.bincount(owner[owner >= 0], minlength=len(scene.things))
    id_of_stuff = np.full(len(CLASSES), VOID, dtype=np.int32)
    for category in np.flatnonzero(stuff_pixels):
        segments.append(Segment(len(segments) + 1, int(category), thing=False))
        id_of_stuff[category] = segments[-1].id
    id_of_thing = np.full(len(scene.things) + 1, VOID, dtype=np.int32)
    for i in np.flatnonzero(thing_pixels >= MIN_VISIBLE_PIXELS):
        segments.append(Segment(len(segments) + 1, category_of(scene.things[i], scene), thing=True))
        id_of_thing[i] = segments[-1].id
    panoptic = np.where(owner < 0, id_of_stuff[stuff], id_of_thing[owner])
    category_of_id = np.array([IGNORE, *(segment.category for segment in segments)], dtype=np.uint8)
    return category_of_id[panoptic], panoptic, tuple(segments)


def _expose(image: Ints, light: Light, dice: Dice) -> npt.NDArray[np.uint8]:
    """Illumination gradient, colour cast, blur and noise: [3, H, W] to uint8 [H, W, 3]."""
    _, H, W = image.shape
    down = 256 + light.slope[0] * (2 * np.arange(H, dtype=np.int32) - H) // (2 * H)
    across = light.slope[1] * (2 * np.arange(W, dtype=np.int32) - W) // (2 * W)
    image = image * (down[:, None] + across) * _planes(light.cast) >> 16
    for _ in range(light.blur):
        image = _smooth(_smooth(image).swapaxes(1, 2)).swapaxes(1, 2)
    noise = dice.bytes(3, H, W).astype(np.int32) + dice.bytes(3, H, W) - 255
    exposed = np.clip(image + (noise * light.noise >> 8), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(exposed.transpose(1, 2, 0))


def _smooth(image: Ints) -> Ints:
    """Binomial filter (1, 2, 1)/4 along the last axis."""
    before = np.concatenate([image[..., :1], image[..., :-1]], axis=-1)
    after = np.concatenate([image[..., 1:], image[..., -1:]], axis=-1)
    return (before + 2 * image + after + 2) >> 2
