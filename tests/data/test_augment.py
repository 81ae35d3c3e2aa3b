"""Augmentation: image, labels and segments stay together, whatever is drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from emca_bench.data import IGNORE, VOID, Augmentation, Sample, Scenes, Segment
from emca_bench.data import augment as A
from emca_bench.errors import UsageError


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
    augmentation = Augmentation(size=(64, 64), scale=(0.6, 2.0), color="none")
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
    same = Augmentation(size=(128, 128), scale=(1, 1), flip=False, color="none")(sample, np.random.default_rng(0))
    assert same.panoptic is not None
    assert (same.image == sample.image).all()
    assert (same.panoptic == sample.panoptic).all()
    assert same.segments == sample.segments


def test_flip_is_its_own_inverse_and_happens_half_of_the_time(rng: np.random.Generator) -> None:
    sample = Scenes("val", count=1)[0]
    assert (A.flip(A.flip(sample)).image == sample.image).all()
    assert (A.flip(sample).semantic[:, 0] == sample.semantic[:, -1]).all()
    augmentation = Augmentation(size=(128, 128), scale=(1, 1), color="none")
    flipped = sum((augmentation(sample, rng).image == A.flip(sample).image).all() for _ in range(60))
    assert 10 <= flipped <= 50


def test_crops_reach_every_corner(rng: np.random.Generator) -> None:
    sample = labelled_by_colour(rng, (20, 30))
    corner = np.arange(600, dtype=np.int32).reshape(20, 30) + 1
    sample = replace(sample, panoptic=corner)
    windows = [A.window_at(sample.size, (18, 28), tuple(rng.random(2))) for _ in range(300)]
    firsts = {int(A.part_of_resized(sample, sample.size, window).panoptic[0, 0]) for window in windows}
    assert firsts == {1 + 30 * y + x for y in range(3) for x in range(3)}


def resized(sample: Sample, scale: float) -> Sample:
    return A.part_of_resized(sample, A.scaled_size(sample.size, scale), (slice(None), slice(None)))


def test_a_part_of_a_resized_image_is_that_part_of_the_whole(rng: np.random.Generator) -> None:
    """To a rounding here and there of what Pillow interpolates; labels exactly."""
    for _ in range(30):
        H, W = (int(side) for side in rng.integers(1, 90, 2))
        image = rng.integers(0, 256, (H, W, 3), dtype=np.uint8)
        ids = rng.integers(0, 1 << 20, (H, W), dtype=np.int32)
        sample = Sample("noise", image, rng.integers(0, 256, (H, W), dtype=np.uint8), ids)
        whole = resized(sample, float(rng.uniform(0.2, 3)))
        window = A.window_at(whole.size, rng.integers(1, 120, 2), (rng.random(), rng.random()))
        part = A.part_of_resized(sample, whole.size, window)
        # each of the two passes, along rows and along columns, rounds to whole numbers
        assert abs(part.image.astype(int) - whole.image[window]).max() <= 2
        assert (part.semantic == whole.semantic[window]).all()
        assert (part.panoptic == whole.panoptic[window]).all()


def test_scales_span_their_range(rng: np.random.Generator) -> None:
    sample = Sample("white", np.full((50, 50, 3), 255, np.uint8), np.zeros((50, 50), np.uint8))
    augmentation = Augmentation(size=(200, 200), scale=(0.5, 2.0), color="none")
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
        scaled = resized(Sample("square", image, semantic), scale)
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
        ({"size": (5, 5), "color": "sdd"}, r"augmentation color is 'sdd' \(did you mean 'ssd'\?\); expected one of none, simple, ssd"),
        ({"size": (5, 5), "scale_draw": "tens"}, "augmentation scale_draw is 'tens'"),
        ({"size": (5, 5), "category_area": 0.0}, "augmentation category_area is 0.0"),
        ({"size": (5, 5), "category_area": 1.1}, "augmentation category_area is 1.1"),
    ],
)
def test_what_cannot_be_done_is_named(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Augmentation(**options)


def test_scales_are_of_the_short_side_where_one_is_set(rng: np.random.Generator) -> None:
    sample = Scenes("train", size=(64, 96), count=1)[0]
    augment = Augmentation((128, 192), scale=(1, 1), short_side=128, flip=False, color="none")
    assert (augment(sample, rng).image == resized(sample, 2.0).image).all()
    with pytest.raises(UsageError, match="short_side is -1"):
        Augmentation((8, 8), short_side=-1)


def test_published_scales_are_tenths_with_a_limit_on_the_long_side(rng: np.random.Generator) -> None:
    """0.5 to 2.0 of the short side, each as often; at most four short sides long."""
    white = Sample("white", np.full((10, 15, 3), 255, np.uint8), np.zeros((10, 15), np.uint8))
    augment = Augmentation((200, 400), scale=(0.5, 2.0), scale_draw="tenths", short_side=100, color="none")
    sides = [int((augment(white, rng).semantic[:, 0] == 0).sum()) for _ in range(800)]
    assert set(sides) == set(range(50, 201, 10))
    assert 110 < np.mean(sides) < 140
    assert 15 < sides.count(50) < 100
    long = Sample("long", np.full((10, 35, 3), 255, np.uint8), np.zeros((10, 35), np.uint8))
    heights = {int((augment(long, rng).semantic[:, 0] == 0).sum()) for _ in range(200)}
    assert max(heights) == round(400 / 35 * 10)


def half_and_half() -> Sample:
    """Two categories side by side, and a wide margin without a label around them."""
    semantic = np.full((60, 100), IGNORE, np.uint8)
    semantic[20:40, 10:50], semantic[20:40, 50:90] = 3, 7
    return Sample("halves", np.zeros((60, 100, 3), np.uint8), semantic)


def test_no_category_fills_a_crop_where_ten_tries_find_another(rng: np.random.Generator) -> None:
    """Ignored pixels do not count, and neither does a crop of nothing but them."""
    options = {"scale": (1, 1), "flip": False, "color": "none"}
    limited, free = (Augmentation((20, 40), category_area=area, **options) for area in (0.75, 1.0))
    for augment, least, most in ((limited, 0.0, 0.12), (free, 0.5, 1.0)):
        shares = np.array([A.largest_share(augment(half_and_half(), rng).semantic) for _ in range(300)])
        # seven of ten crops have too much of one category, and so 3 in 100 sets of ten
        assert least <= (shares >= 0.75).mean() <= most


@pytest.mark.parametrize(("counts", "share"), [((0, 0), 1.0), ((5, 0), 1.0), ((30, 10), 0.75), ((10, 10), 0.5)])
def test_the_share_of_the_commonest_label(counts: tuple[int, int], share: float) -> None:
    labels = np.repeat(np.array([0, 254, IGNORE], np.uint8), [*counts, 50])
    assert A.largest_share(labels[None]) == share


def test_a_limit_that_nothing_meets_takes_the_tenth_crop(rng: np.random.Generator) -> None:
    """Of one category there is no other crop; the generator is asked ten times for two numbers, and no more."""
    one = Sample("one", np.zeros((30, 40, 3), np.uint8), np.zeros((30, 40), np.uint8))
    augment = Augmentation((10, 10), scale=(1, 1), category_area=0.75, flip=False, color="none")
    here, there = (np.random.default_rng(int(rng.integers(1 << 31))) for _ in range(2))
    there.bit_generator.state = here.bit_generator.state
    augment(one, here)
    there.uniform()
    there.random(20)
    assert here.bit_generator.state == there.bit_generator.state
