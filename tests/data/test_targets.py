"""Targets: masks partition the labelled pixels, and padding is neither valid nor in a mask."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from emca_bench.data import IGNORE, Sample, Scenes, Segment
from emca_bench.data.targets import collate, panoptic_targets, semantic_targets
from emca_bench.errors import UsageError


def small_sample() -> Sample:
    semantic = np.array([[3, 3, IGNORE], [1, 3, 1]], dtype=np.uint8)
    panoptic = np.array([[7, 7, 0], [2, 9, 2]], dtype=np.int32)
    segments = (Segment(2, 1, thing=False), Segment(7, 3, thing=True), Segment(9, 3, thing=True))
    return Sample("small", np.arange(18, dtype=np.uint8).reshape(2, 3, 3), semantic, panoptic, segments)


def test_semantic_targets_have_one_mask_a_class() -> None:
    targets = semantic_targets(small_sample())
    assert targets.labels.tolist() == [1, 3]
    assert targets.masks.tolist() == [[[False, False, False], [True, False, True]], [[True, True, False], [False, True, False]]]
    assert targets.valid.tolist() == [[True, True, False], [True, True, True]]
    assert (targets.labels.dtype, targets.masks.dtype, targets.valid.dtype) == (torch.int64, torch.bool, torch.bool)


def test_panoptic_targets_have_one_mask_a_segment() -> None:
    targets = panoptic_targets(small_sample())
    assert targets.labels.tolist() == [1, 3, 3]
    assert targets.masks.sum((1, 2)).tolist() == [2, 2, 1]
    assert targets.masks[2, 1, 1]
    assert not targets.valid[0, 2]


@pytest.mark.parametrize("task", ["semantic", "panoptic"])
def test_batches_of_scenes_partition_the_valid_pixels(task: str) -> None:
    samples = [Scenes("train", size=size, count=1)[0] for size in ((64, 64), (70, 100))]
    images, targets = collate(samples, task)
    assert images.shape == (2, 3, 96, 128)
    assert images.dtype == torch.float32
    for image, target, sample in zip(images, targets, samples, strict=True):
        h, w = sample.size
        assert (image[:, :h, :w].permute(1, 2, 0).numpy() == sample.image).all()
        outside = torch.ones(96, 128, dtype=torch.bool)
        outside[:h, :w] = False
        assert (image[:, outside] == 128).all()
        assert not target.valid[outside].any()
        assert target.masks.shape == (len(target.labels), 96, 128)
        assert (target.masks.sum(0) == target.valid).all()
        assert target.masks.any(2).any(1).all()
        restored = torch.full((96, 128), IGNORE)
        for label, mask in zip(target.labels, target.masks, strict=True):
            restored[mask] = label
        assert (restored[:h, :w].numpy() == sample.semantic).all()


def test_multiples_of_32_are_not_padded_further() -> None:
    assert collate([Scenes("train", size=(64, 96), count=1)[0]], "semantic")[0].shape == (1, 3, 64, 96)


@pytest.mark.parametrize("task", ["semantic", "panoptic"])
def test_an_unlabelled_image_has_no_targets(task: str) -> None:
    sample = Sample("void", np.zeros((8, 8, 3), np.uint8), np.full((8, 8), IGNORE, np.uint8), np.zeros((8, 8), np.int32))
    _, [target] = collate([sample], task)
    assert target.labels.shape == (0,)
    assert target.masks.shape == (0, 32, 32)
    assert not target.valid.any()


def test_targets_move_to_a_device() -> None:
    moved = semantic_targets(small_sample()).to("meta")
    assert {moved.labels.device.type, moved.masks.device.type, moved.valid.device.type} == {"meta"}


def test_mirrored_views_are_accepted() -> None:
    sample = small_sample()
    assert sample.panoptic is not None
    mirrored = Sample("mirrored", sample.image[:, ::-1], sample.semantic[:, ::-1], sample.panoptic[:, ::-1], sample.segments)
    images, _ = collate([mirrored], "panoptic")
    assert images[0, 0, 0, 0] == sample.image[0, 2, 0]


def test_conflicting_input_is_named() -> None:
    image, semantic = np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5), np.uint8)
    with pytest.raises(UsageError, match=r"semantic labels of 'a' are 5x4 \(HxW\); expected 4x5 as its image"):
        Sample("a", image, semantic.T)
    with pytest.raises(UsageError, match=r"panoptic labels of 'a' are 2x5 \(HxW\); expected 4x5"):
        Sample("a", image, semantic, np.zeros((2, 5), np.int32))
    with pytest.raises(UsageError, match=r"image of 'a' has shape \[4, 5\]; expected \[H, W, 3\]"):
        Sample("a", semantic, semantic)
    with pytest.raises(UsageError, match="sample 'a' has semantic labels only"):
        collate([Sample("a", image, semantic)], "panoptic")
    with pytest.raises(UsageError, match=r"unknown task 'semantics' \(did you mean 'semantic'\?\); known: panoptic, semantic"):
        collate([Sample("a", image, semantic)], "semantics")
    with pytest.raises(UsageError, match="a batch of 0 samples"):
        collate([], "semantic")


def test_datasets_are_listed_without_torch() -> None:
    code = "import sys, emca_bench.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
