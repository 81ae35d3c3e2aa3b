"""Generated scenes: the same everywhere, consistent truth, and neither colour nor a small neighbourhood gives the class away."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from emca_bench.data import IGNORE, VOID, Dataset, Scenes, open_dataset
from emca_bench.data.dice import Dice
from emca_bench.data.scene_layout import CATEGORY, CLASSES, SUBPIXEL, TURN, Scene, Thing, category_of, draw_scene, ring_width
from emca_bench.data.scene_render import SHADOW, render, thing_distance
from emca_bench.errors import UsageError

PRINT_DIGEST = """
import hashlib
from emca_bench.data import open_dataset
digest = hashlib.sha256()
for sample in open_dataset("scenes", "val", size=(96, 160), count=6, seed=5):
    digest.update(sample.image.tobytes() + sample.semantic.tobytes() + sample.panoptic.tobytes() + repr(sample.segments).encode())
print(digest.hexdigest())
"""


def confusion(dataset: Dataset, lookup: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.int64]:
    """Counts [bins, classes] of colour bins (4 bits a channel), or [classes, classes] of prediction against truth with a lookup."""
    rows = 4096 if lookup is None else len(CLASSES)
    counts = np.zeros((rows, len(CLASSES)), dtype=np.int64)
    for sample in dataset:
        red, green, blue = np.moveaxis(sample.image.astype(np.int64) >> 4, -1, 0)
        bins = red << 8 | green << 4 | blue
        row = bins if lookup is None else lookup[bins]
        labelled = sample.semantic != IGNORE
        np.add.at(counts, (row[labelled], sample.semantic[labelled]), 1)
    return counts


def mean_iou(matrix: npt.NDArray[np.int64]) -> float:
    hits = np.diag(matrix)
    return float(np.mean(hits / (matrix.sum(0) + matrix.sum(1) - hits)))


def scenes_with_a_nucleus(count: int, seed: int) -> list[tuple[Scene, int]]:
    """Drawn scenes, each with the index of a nucleus among its things."""
    found = []
    for index in range(100 * count):
        scene = draw_scene((128, 128), Dice(seed, index))
        indices = [i for i, thing in enumerate(scene.things) if category_of(thing, scene) == CATEGORY["nucleus"]]
        if indices:
            found.append((scene, indices[0]))
        if len(found) == count:
            return found
    raise AssertionError(f"only {len(found)} scenes hold a nucleus")


def test_two_processes_generate_the_same_bits() -> None:
    first, second = (
        subprocess.run([sys.executable, "-c", PRINT_DIGEST], capture_output=True, text=True, check=True).stdout for _ in range(2)
    )
    assert first == second
    assert len(first.strip()) == 64


def test_bits_belong_to_the_version() -> None:
    """Every machine must reach this digest; who changes it on purpose raises scenes.VERSION."""
    digest = hashlib.sha256()
    for sample in Scenes("train", size=(64, 96), count=8, seed=3):
        assert sample.panoptic is not None
        digest.update(sample.image.tobytes() + sample.semantic.tobytes() + sample.panoptic.astype("<i4").tobytes())
    assert digest.hexdigest()[:16] == "3ebeb59df3f7f155"


def test_splits_seeds_and_indices_give_different_images() -> None:
    datasets = [Scenes(split, size=(64, 64), count=12, seed=seed) for split in ("train", "val", "test") for seed in (0, 1)]
    images = {sample.image.tobytes() for dataset in datasets for sample in dataset}
    assert len(images) == 6 * 12


def test_a_scene_depends_on_its_index_alone() -> None:
    few, many = Scenes("train", count=3), Scenes("train", count=9)
    assert (few[2].image == many[2].image).all()
    assert (few[-1].image == few[2].image).all()
    with pytest.raises(IndexError, match="sample 3 of scenes train, which has 3"):
        few[3]


def test_fingerprint_changes_with_every_option() -> None:
    options: list[dict] = [{}, {"seed": 1}, {"count": 5}, {"size": (64, 64)}]
    prints = [open_dataset("scenes", split, **option).fingerprint() for split in ("train", "test") for option in options]
    assert len(set(prints)) == len(prints)
    assert Scenes("train").fingerprint() == Scenes("train").fingerprint()


@pytest.mark.parametrize("size", [(128, 128), (64, 200), (150, 97)])
def test_semantic_panoptic_and_segments_agree(size: tuple[int, int]) -> None:
    for sample in Scenes("train", size=size, count=40, seed=11):
        assert sample.panoptic is not None
        assert sample.image.shape == (*size, 3)
        assert (sample.image.dtype, sample.semantic.dtype, sample.panoptic.dtype) == (np.uint8, np.uint8, np.int32)
        ids = [segment.id for segment in sample.segments]
        assert ids == sorted(set(np.unique(sample.panoptic).tolist()) - {VOID})
        assert ((sample.semantic == IGNORE) == (sample.panoptic == VOID)).all()
        for segment in sample.segments:
            assert (sample.semantic[sample.panoptic == segment.id] == segment.category).all()
            assert segment.thing == CLASSES[segment.category].thing
        stuff = [segment.category for segment in sample.segments if not segment.thing]
        assert len(stuff) == len(set(stuff))


def test_every_class_is_common() -> None:
    scenes = [sample.segments for sample in Scenes("train", count=200)]
    share = {info.name: np.mean([any(s.category == i for s in segments) for segments in scenes]) for i, info in enumerate(CLASSES)}
    assert min(share.values()) > 0.2, share


def test_a_colour_lookup_fails(record_property: pytest.RecordProperty) -> None:
    bins = confusion(Scenes("train", count=160))
    matrix = confusion(Scenes("test", count=80), bins.argmax(1))
    figure = mean_iou(matrix)
    record_property("colour_lookup_miou", figure)
    print(f"mIoU of a colour lookup: {figure:.4f}")
    assert 0 < figure < 0.10


def test_disc_and_nucleus_look_the_same_up_to_the_ring() -> None:
    for scene, index in scenes_with_a_nucleus(12, seed=21):
        nucleus = scene.things[index]
        ring = next(t for t in scene.things if t.shape == "ring" and (t.y, t.x) == (nucleus.y, nucleus.x))
        without = replace(scene, things=tuple(t for t in scene.things if t is not ring))
        with_ring, alone = (render("", content, Dice(7)) for content in (scene, without))
        hole = ring.radius - ring_width(ring.radius)
        reach = (hole - SHADOW) // SUBPIXEL - 1 - scene.light.blur
        assert reach * SUBPIXEL > 1.5 * nucleus.radius
        y, x = (np.arange(128) * SUBPIXEL + SUBPIXEL // 2 - centre for centre in (nucleus.y, nucleus.x))
        near = y[:, None] ** 2 + x**2 <= (reach * SUBPIXEL) ** 2
        assert (with_ring.image[near] == alone.image[near]).all()
        assert (with_ring.image != alone.image).any()
        row, column = nucleus.y // SUBPIXEL, nucleus.x // SUBPIXEL
        assert with_ring.semantic[row, column] == CATEGORY["nucleus"]
        assert alone.semantic[row, column] == CATEGORY["disc"]


def test_neither_disc_nor_ring_alone_predicts_the_nucleus() -> None:
    scenes = [draw_scene((128, 128), Dice(31, index)) for index in range(300)]
    discs = [CLASSES[category_of(thing, scene)].name for scene in scenes for thing in scene.things if thing.shape == "disc"]
    assert 0.2 < discs.count("nucleus") / len(discs) < 0.5
    rings = sum(thing.shape == "ring" for scene in scenes for thing in scene.things)
    assert 0.2 < discs.count("nucleus") / rings < 0.6
    radii = {name: [] for name in ("disc", "nucleus")}
    for scene in scenes:
        for thing in scene.things:
            if thing.shape == "disc":
                radii[CLASSES[category_of(thing, scene)].name].append(thing.radius)
    assert abs(np.mean(radii["disc"]) / np.mean(radii["nucleus"]) - 1) < 0.03


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("disc", math.pi),
        ("ring", math.pi * (1 - (6 / 7) ** 2)),
        ("triangle", 3 * math.sqrt(3) / 4),
        ("square", 2.0),
        ("star", 5 * math.sin(math.pi / 5) * math.cos(2 * math.pi / 5) / math.cos(math.pi / 5)),
    ],
)
def test_shapes_have_the_area_of_their_figure(shape: str, area: float) -> None:
    y = np.arange(200, dtype=np.int32)[:, None] * SUBPIXEL + SUBPIXEL // 2
    for angle in range(0, TURN, TURN // 7):
        thing = Thing(shape, 100 * SUBPIXEL, 97 * SUBPIXEL, 70 * SUBPIXEL, angle, (0, 0, 0))
        pixels = np.count_nonzero(thing_distance(thing, y, y.T) >= 0)
        assert pixels == pytest.approx(area * 70**2, rel=0.025)


def test_a_thing_out_of_sight_is_void() -> None:
    scene = next(s for s in (draw_scene((128, 128), Dice(41, i)) for i in range(50)) if s.things)
    speck = Thing("square", 64 * SUBPIXEL, 64 * SUBPIXEL, SUBPIXEL, 0, (255, 0, 0))
    sample = render("", replace(scene, things=(speck,)), Dice(0))
    assert sample.semantic[64, 64] == IGNORE
    assert not any(segment.thing for segment in sample.segments)
    assert 0 < np.count_nonzero(sample.semantic == IGNORE) < 12


@pytest.mark.parametrize(
    ("name", "split", "options", "message"),
    [
        (
            "scene",
            "train",
            {},
            r"unknown dataset 'scene' \(did you mean 'scenes'\?\); known: ade20k, .*, scenes",
        ),
        ("scenes", "trian", {}, r"unknown split 'trian' of dataset 'scenes' \(did you mean 'train'\?\); known: test, train, val"),
        ("scenes", "train", {"sise": 3}, r"unknown option 'sise' of dataset 'scenes' \(did you mean 'size'\?\); known: count, seed, size"),
        ("scenes", "train", {"split_": 3}, "unknown option 'split_'"),
        (
            "scenes",
            "train",
            {"size": (64, 32)},
            r"option 'size' of dataset 'scenes' is \(64, 32\); expected two integers \(H, W\) in 64..1024",
        ),
        ("scenes", "train", {"size": 128}, "option 'size' of dataset 'scenes' is 128"),
        ("scenes", "train", {"size": [128, 128.0]}, "option 'size' of dataset 'scenes'"),
        ("scenes", "train", {"count": 0}, "option 'count' of dataset 'scenes' is 0; expected an integer of at least 1"),
        ("scenes", "train", {"seed": -1}, "option 'seed' of dataset 'scenes' is -1; expected an integer of at least 0"),
    ],
)
def test_what_cannot_be_opened_is_named(name: str, split: str, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_dataset(name, split, **options)
