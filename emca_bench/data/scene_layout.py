"""What is in a generated scene: layers of stuff, things upon them, and light. Everything is an integer.

Lengths are in 1/SUBPIXEL pixel, angles in 1/TURN of a turn, sines in 1/ONE, colours RGB in 0..255.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from emca_bench.data.base import ClassInfo, Color
from emca_bench.data.dice import Dice

SUBPIXEL = 16
TURN = 1024
FIXED = 12
ONE = 1 << FIXED
SINE = tuple(round(ONE * math.sin(2 * math.pi * i / TURN)) for i in range(TURN))

CLASSES = (
    ClassInfo("bands", False, (148, 168, 190)),
    ClassInfo("columns", False, (196, 182, 150)),
    ClassInfo("checker", False, (156, 186, 160)),
    ClassInfo("dots", False, (190, 164, 186)),
    ClassInfo("disc", True, (214, 69, 65)),
    ClassInfo("nucleus", True, (245, 171, 53)),
    ClassInfo("ring", True, (38, 120, 178)),
    ClassInfo("triangle", True, (30, 150, 110)),
    ClassInfo("square", True, (130, 80, 170)),
    ClassInfo("star", True, (90, 60, 40)),
)
CATEGORY = {info.name: index for index, info in enumerate(CLASSES)}
STUFF = tuple(info.name for info in CLASSES if not info.thing)
FREE_SHAPES = ("disc", "triangle", "square", "star")
RING_CONTENTS = ("disc", "disc", "disc", "disc", "triangle", "square", "star", None)
ENOUGH_CONTRAST = 190
"""Sum over R, G, B of the differences of a thing's colour from that of any layer."""


@dataclass(frozen=True)
class Layer:
    """A region of one stuff class, lying on the layers before it, beyond a wavy edge.

    Attributes:
        category: class index, which decides the texture.
        edge: where the edge lies along the scene's direction, from the image centre.
        wave: amplitude, length and phase (in 1/TURN) of the edge's wave.
        tilt: angle of the texture.
        period: of the texture.
        phase: of the texture in y and x.
        colors: the two colours of the texture.
    """

    category: int
    edge: int
    wave: tuple[int, int, int]
    tilt: int
    period: int
    phase: tuple[int, int]
    colors: tuple[Color, Color]


@dataclass(frozen=True)
class Thing:
    """A shape at a centre; `radius` is that of the circle around it."""

    shape: str
    y: int
    x: int
    radius: int
    angle: int
    color: Color


@dataclass(frozen=True)
class Light:
    """Illumination and camera: gain slope over the height and the width, gain per channel (all in 1/256), noise amplitude, blur passes."""

    slope: tuple[int, int]
    cast: Color
    noise: int
    blur: int


@dataclass(frozen=True)
class Scene:
    """A whole scene; layers and things are listed from back to front.

    Attributes:
        size: (H, W) in pixels.
        direction: angle in which the layers follow each other.
    """

    size: tuple[int, int]
    direction: int
    layers: tuple[Layer, ...]
    things: tuple[Thing, ...]
    light: Light


def ring_width(radius: int) -> int:
    """Width of the band of a ring of the given outer radius."""
    return radius // 7


def category_of(thing: Thing, scene: Scene) -> int:
    """Class index of a thing: a disc wholly inside a ring's hole is a "nucleus", else a shape's class is its own."""
    if thing.shape == "disc":
        for ring in scene.things:
            hole = ring.radius - ring_width(ring.radius) - thing.radius
            if ring.shape == "ring" and hole > 0 and _squared_distance(thing, ring) < hole**2:
                return CATEGORY["nucleus"]
    return CATEGORY[thing.shape]


def draw_scene(size: tuple[int, int], dice: Dice) -> Scene:
    """Draw the content of a scene of (H, W) pixels."""
    direction = dice.between(0, TURN - 1)
    hues = _draw_hues(dice)
    layers = _draw_layers(size, direction, hues, dice)
    things = _draw_things(size, hues, [color for layer in layers for color in layer.colors], dice)
    cast = (dice.between(212, 280), dice.between(212, 280), dice.between(212, 280))
    light = Light((dice.between(-110, 110), dice.between(-110, 110)), cast, dice.between(8, 44), dice.pick((0, 0, 1, 1, 2)))
    return Scene(size, direction, layers, things, light)


def _draw_layers(size: tuple[int, int], direction: int, hues: list[int], dice: Dice) -> tuple[Layer, ...]:
    unit = min(size) * SUBPIXEL
    names = dice.sample(STUFF, dice.pick((2, 3, 3, 4)))
    extent = (size[0] * abs(SINE[direction]) + size[1] * abs(SINE[(direction + TURN // 4) % TURN])) * SUBPIXEL >> FIXED
    step = extent * 15 // (16 * len(names))
    layers = []
    for i, name in enumerate(names):
        edge = (2 * i - len(names)) * step // 2 + dice.between(-step // 5, step // 5)
        wave = (dice.between(unit // 40, unit // 12), dice.between(unit // 3, unit), dice.between(0, TURN - 1))
        period = dice.between(unit // 16, unit // 10)
        phase = (dice.between(0, period), dice.between(0, period))
        layers.append(Layer(CATEGORY[name], edge, wave, dice.between(-36, 36), period, phase, _draw_pair(hues, dice)))
    return tuple(layers)


def _draw_things(size: tuple[int, int], hues: list[int], behind: list[Color], dice: Dice) -> tuple[Thing, ...]:
    unit = min(size) * SUBPIXEL
    crowd = max(1, size[0] * size[1] // min(size) ** 2)
    things: list[Thing] = []
    for _ in range(crowd * dice.pick((0, 1, 1, 2, 2))):
        ring = _place("ring", dice.between(unit * 39 // 200, unit * 47 // 200), size, things, dice)
        if ring is None:
            continue
        things.append(_paint(ring, hues, behind, dice))
        inside = dice.pick(RING_CONTENTS)
        if inside is not None:
            radius = _draw_radius("disc", unit, dice) * (2 if inside == "disc" else 3) // 2
            content = Thing(inside, ring.y, ring.x, radius, dice.between(0, TURN - 1), (0, 0, 0))
            things.append(_paint(content, hues, behind, dice))
    for _ in range(crowd * dice.between(3, 8)):
        shape = dice.pick(FREE_SHAPES)
        thing = _place(shape, _draw_radius(shape, unit, dice), size, things, dice)
        if thing is not None:
            things.append(_paint(thing, hues, behind, dice))
    return tuple(things)


def _draw_radius(shape: str, unit: int, dice: Dice) -> int:
    if shape == "disc":
        return dice.between(unit * 10 // 200, unit * 13 // 200)
    return dice.between(unit * 14 // 200, unit * 26 // 200) * (5 if shape == "star" else 4) // 4


def _place(shape: str, radius: int, size: tuple[int, int], things: list[Thing], dice: Dice) -> Thing | None:
    """A thing that hides little of those already placed, or None after some tries; rings lie wholly in the image."""
    margin = radius if shape == "ring" else radius // 2
    for _ in range(12):
        y = dice.between(margin, size[0] * SUBPIXEL - margin)
        x = dice.between(margin, size[1] * SUBPIXEL - margin)
        thing = Thing(shape, y, x, radius, dice.between(0, TURN - 1), (0, 0, 0))
        if all(_squared_distance(thing, other) >= _clearance(thing, other) ** 2 for other in things):
            return thing
    return None


def _clearance(a: Thing, b: Thing) -> int:
    """Least distance of two centres: things may overlap at the rim, but a disc stays clear of rings that do not enclose it."""
    shapes = {a.shape, b.shape}
    if shapes == {"disc", "ring"}:
        return a.radius + b.radius + SUBPIXEL
    if shapes == {"ring"}:
        return a.radius + b.radius
    if "ring" in shapes:
        return max(a.radius, b.radius) + min(a.radius, b.radius) * 5 // 8
    return (a.radius + b.radius) * 11 // 16


def _squared_distance(a: Thing, b: Thing) -> int:
    return (a.y - b.y) ** 2 + (a.x - b.x) ** 2


def _draw_hues(dice: Dice) -> list[int]:
    """A few hues that go together: neighbours and near-complements of one."""
    base = dice.between(0, 1535)
    return [base, base + dice.between(90, 220), base - dice.between(90, 220), base + dice.between(640, 900)]


def _draw_color(hues: list[int], dice: Dice) -> Color:
    return _rgb(dice.pick(hues) + dice.between(-50, 50), dice.between(30, 170), dice.between(70, 250))


def _draw_pair(hues: list[int], dice: Dice) -> tuple[Color, Color]:
    """Two colours of one hue and different value, either first."""
    hue, saturation, value = dice.pick(hues), dice.between(25, 130), dice.between(80, 195)
    contrast = dice.between(34, 60)
    light = _rgb(hue + dice.between(-40, 40), saturation * 3 // 4, value + contrast)
    dark = _rgb(hue + dice.between(-40, 40), saturation, value)
    return (light, dark) if dice.chance(50) else (dark, light)


def _paint(thing: Thing, hues: list[int], behind: list[Color], dice: Dice) -> Thing:
    """The thing in a colour that stands off from all layers, as far as some tries find one."""
    best, widest = (0, 0, 0), -1
    for _ in range(12):
        r, g, b = color = _draw_color(hues, dice)
        contrast = min(abs(r - other[0]) + abs(g - other[1]) + abs(b - other[2]) for other in behind)
        if contrast > widest:
            best, widest = color, contrast
        if widest >= ENOUGH_CONTRAST:
            break
    return replace(thing, color=best)


def _rgb(hue: int, saturation: int, value: int) -> Color:
    """RGB of a hue in 1/1536 of a turn, a saturation and a value in 0..255."""
    sector, rest = divmod(hue % 1536, 256)
    low, falling, rising = (value * (255 - saturation * part // 255) // 255 for part in (255, rest, 255 - rest))
    return (
        (value, rising, low),
        (falling, value, low),
        (low, value, rising),
        (low, falling, value),
        (rising, low, value),
        (value, low, falling),
    )[sector]
