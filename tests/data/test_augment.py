"""Augmentation: image, labels and segments stay together, whatever is drawn."""

from __future__ import annotations

import secrets
from dataclasses import replace

import numpy as np
import pytest

from emca_bench.data import IGNORE, VOID, Augmentation, Sample, Scenes, Segment
from emca_bench.data import augment as A
from emca_bench.errors import UsageError


@pytest.fixture
def rng() -> np.random.Generator:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def labelled_by_colour(rng: np.random.Generator, size: tuple[int, int]) -> Sample:
    """Blocks of 8x8 pixels whose image value tells the segment, so that image and labels can be compared after any transform."""
    H, W = size
    ids = rng.integers(1, 9, (-(-H // 8), -(-W // 8))).repeat(8, 0).repeat(8, 1)[:H, :W].astype(np.int32)
    image = np.repeat((ids * 20).astype(np.uint8)[..., None], 3, axis=2)
    segments = tuple(Segment(int(i), int(i) % 4, thing=bool(i % 2)) for i in np.unique(ids))
    return Sample("blocks", image, (ids % 4).astype(np.uint8), ids, segments)


def check_agreement(sample: Sample) -> None:
    assert sample.panoptic is not None
    assert {segment.id for segment in sample.segments} == set(np.unique(sample.panoptic).tolist()) - {VOID}
    for segment in sample.segments:
        assert (sample.semantic[sample.panoptic == segment.id] == segment.category).all()
    assert ((sample.semantic == IGNORE) == (sample.panoptic == VOID)).all()


def test_truth_stays_consistent_and_sizes_are_fixed(rng: np.random.Generator) -> None:
    augmentation = Augmentation(size=(96, 80), scale=(0.3, 2.5))
    dropped = 0
    for sample in Scenes("train", size=(128, 100), count=40, seed=int(rng.integers(1 << 31))):
        result = augmentation(sample, rng)
        assert result.image.shape == (96, 80, 3)
        assert result.semantic.shape == (96, 80)
        assert (result.image.dtype, result.semantic.dtype) == (np.uint8, np.uint8)
        assert set(result.segments) <= set(sample.segments)
        dropped += len(sample.segments) - len(result.segments)
        check_agreement(result)
    assert dropped > 0


def test_image_and_labels_move_together(rng: np.random.Generator) -> None:
    augmentation = Augmentation(size=(64, 64), scale=(0.6, 2.0), color=0)
    for _ in range(20):
        sample = augmentation(labelled_by_colour(rng, (70, 90)), rng)
        assert sample.panoptic is not None
        labelled = sample.panoptic != VOID
        away = abs(sample.image[..., 0].astype(int) - 20 * sample.panoptic)[labelled]
        # interpolation mixes neighbours along block edges, for at most half of the pixels at these scales
        assert np.mean(away <= 2) > 0.5
        assert (sample.image[~labelled] == 128).all()
        assert (sample.semantic[~labelled] == IGNORE).all()


def test_the_generator_alone_decides(rng: np.random.Generator) -> None:
    sample, seed = Scenes("train", count=1)[0], int(rng.integers(1 << 31))
    augmentation = Augmentation(size=(64, 64))
    first, again, other = (augmentation(sample, np.random.default_rng(s)) for s in (seed, seed, seed + 1))
    assert (first.image == again.image).all()
    assert (first.semantic == again.semantic).all()
    assert (first.image != other.image).any()


def test_the_source_is_left_alone(rng: np.random.Generator) -> None:
    sample, untouched = Scenes("val", count=1)[0], Scenes("val", count=1)[0]
    Augmentation(size=(160, 160))(sample, rng)
    assert (sample.image == untouched.image).all()
    assert (sample.semantic == untouched.semantic).all()


def test_no_change_is_the_identity() -> None:
    sample = Scenes("val", count=1)[0]
    assert sample.panoptic is not None
    same = Augmentation(size=(128, 128), scale=(1, 1), flip=False, color=0)(sample, np.random.default_rng(0))
    assert same.panoptic is not None
    assert (same.image == sample.image).all()
    assert (same.panoptic == sample.panoptic).all()
    assert same.segments == sample.segments
    assert (A.jitter_color(sample.image, np.ones(3)) == sample.image).all()


def test_flip_is_its_own_inverse_and_happens_half_of_the_time(rng: np.random.Generator) -> None:
    sample = Scenes("val", count=1)[0]
    assert (A.flip(A.flip(sample)).image == sample.image).all()
    assert (A.flip(sample).semantic[:, 0] == sample.semantic[:, -1]).all()
    augmentation = Augmentation(size=(128, 128), scale=(1, 1), color=0)
    flipped = sum((augmentation(sample, rng).image == A.flip(sample).image).all() for _ in range(60))
    assert 10 <= flipped <= 50


def test_crops_reach_every_corner(rng: np.random.Generator) -> None:
    sample = labelled_by_colour(rng, (20, 30))
    corner = np.arange(600, dtype=np.int32).reshape(20, 30) + 1
    sample = replace(sample, panoptic=corner)
    firsts = {int(A.crop(sample, (18, 28), tuple(rng.random(2))).panoptic[0, 0]) for _ in range(300)}
    assert firsts == {1 + 30 * y + x for y in range(3) for x in range(3)}


def test_scales_span_their_range(rng: np.random.Generator) -> None:
    sample = Sample("white", np.full((50, 50, 3), 255, np.uint8), np.zeros((50, 50), np.uint8))
    augmentation = Augmentation(size=(200, 200), scale=(0.5, 2.0), color=0)
    sides = [np.count_nonzero(augmentation(sample, rng).semantic[0] == 0) for _ in range(200)]
    assert 25 <= min(sides) < 30
    assert 85 < max(sides) <= 100
    assert 40 < np.median(sides) < 62


def test_resized_labels_lie_on_the_image(rng: np.random.Generator) -> None:
    """The centre of mass of a bright square and of its label agree after scaling."""
    image, semantic = np.zeros((60, 60, 3), np.uint8), np.zeros((60, 60), np.uint8)
    top, left = rng.integers(5, 30, 2)
    image[top : top + 20, left : left + 20], semantic[top : top + 20, left : left + 20] = 255, 1
    for scale in (0.5, 0.73, 1.5, 2.0):
        scaled = A.resize(Sample("square", image, semantic), scale)
        weights = scaled.image[..., 0] / 255
        for axis in range(2):
            where = np.arange(scaled.size[axis])
            bright, label = (float(w.sum(1 - axis) @ where / w.sum()) for w in (weights, scaled.semantic.astype(float)))
            assert bright == pytest.approx(label, abs=0.51)


def test_semantic_only_samples_have_no_panoptic_after(rng: np.random.Generator) -> None:
    sample = replace(Scenes("val", count=1)[0], panoptic=None, segments=())
    result = Augmentation(size=(64, 64))(sample, rng)
    assert result.panoptic is None
    assert result.segments == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (0, 5)}, r"augmentation size is \(0, 5\)"),
        ({"size": (5,)}, r"augmentation size is \(5,\)"),
        ({"size": (5, 5), "scale": (2.0, 1.0)}, r"augmentation scale is \(2.0, 1.0\)"),
        ({"size": (5, 5), "scale": (0, 1.0)}, "augmentation scale"),
        ({"size": (5, 5), "color": 1.0}, "augmentation color is 1.0"),
    ],
)
def test_what_cannot_be_done_is_named(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Augmentation(**options)


def test_scales_are_of_the_short_side_where_one_is_set(rng: np.random.Generator) -> None:
    sample = Scenes("train", size=(64, 96), count=1)[0]
    augment = Augmentation((128, 192), scale=(1, 1), short_side=128, flip=False, color=0)
    assert (augment(sample, rng).image == A.resize(sample, 2.0).image).all()
    with pytest.raises(UsageError, match="short_side is -1"):
        Augmentation((8, 8), short_side=-1)
