from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from emca_bench.errors import UsageError
from emca_bench.integrations.detectron2 import build_mapper
from emca_bench.integrations.detectron2.mappers import MaskFormerMapper, join_planes, read_panoptic, read_semantic, split_planes

SEMANTIC = "ade20k/semantic/mask2former_R50_bs16_160k.yaml"
PANOPTIC = "ade20k/panoptic/mask2former_R50_bs16_160k.yaml"


def plain(read: Any, *augmentations: Any, divisibility: int = -1, constrained: bool = False) -> MaskFormerMapper:
    return MaskFormerMapper(
        read=read,
        augmentations=augmentations,
        image_format="RGB",
        size_divisibility=divisibility,
        ignore=255,
        classes=9,
        constrained=constrained,
    )


@pytest.fixture
def record(tmp_path: Path, seed: int, rng: np.random.Generator) -> dict[str, Any]:
    """A random image of 40x56 with blocks of 8 as segments, all of them with ids above 256, one of them a crowd."""
    # of detectron2's own draws
    np.random.seed(seed)  # noqa: NPY002
    blocks = np.kron(np.arange(1, 36).reshape(5, 7), np.ones((8, 8), dtype=np.int64))
    ids = 300 * blocks
    classes = (blocks % 9).astype(np.uint8)
    classes[blocks == 5] = 255
    Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(tmp_path / "image.png")
    Image.fromarray(split_planes(ids)).save(tmp_path / "panoptic.png")
    Image.fromarray(classes).save(tmp_path / "semantic.png")
    return {
        "file_name": str(tmp_path / "image.png"),
        "height": 40,
        "width": 56,
        "pan_seg_file_name": str(tmp_path / "panoptic.png"),
        "sem_seg_file_name": str(tmp_path / "semantic.png"),
        "segments_info": [{"id": 300 * n, "category_id": n % 9, "iscrowd": int(n == 7)} for n in range(1, 36) if n != 5],
    }


def test_planes_hold_every_id_of_24_bits(rng: np.random.Generator):
    ids = rng.integers(0, 2**24, (7, 9))
    assert np.array_equal(join_planes(split_planes(ids)), ids)


def test_semantic_truth_is_a_mask_per_class_present(record: dict[str, Any]):
    found = plain(read_semantic)(record)
    assert found["image"].shape == (3, 40, 56)
    assert found["image"].dtype == torch.uint8
    assert sorted(found["instances"].gt_classes.tolist()) == list(range(9))
    classes = torch.from_numpy(np.array(Image.open(record["sem_seg_file_name"])))
    for class_, mask in zip(found["instances"].gt_classes, found["instances"].gt_masks.tensor, strict=True):
        assert torch.equal(mask, classes == class_)


def test_panoptic_truth_is_a_mask_per_segment_without_crowds(record: dict[str, Any]):
    found = plain(read_panoptic)(record)["instances"]
    assert len(found) == 33
    blocks = torch.from_numpy(join_planes(np.array(Image.open(record["pan_seg_file_name"]))) // 300)
    expected = [n for n in range(1, 36) if n not in (5, 7)]
    assert found.gt_classes.tolist() == [n % 9 for n in expected]
    assert torch.equal(found.gt_masks.tensor, torch.stack([blocks == n for n in expected]))


@pytest.mark.parametrize("divisibility", [-1, 32, 64])
def test_padding_is_gray_and_in_no_mask(divisibility: int, record: dict[str, Any]):
    found = plain(read_panoptic, divisibility=divisibility)(record)
    size = {-1: (40, 56), 32: (64, 64), 64: (64, 64)}[divisibility]
    assert tuple(found["image"].shape[1:]) == found["instances"].image_size == tuple(found["instances"].gt_masks.tensor.shape[1:]) == size
    assert (found["image"][:, 40:] == 128).all()
    assert (found["image"][:, :, 56:] == 128).all()
    assert not found["instances"].gt_masks.tensor[:, 40:].any()
    assert not found["instances"].gt_masks.tensor[:, :, 56:].any()


@pytest.mark.parametrize("read", [read_semantic, read_panoptic])
def test_masks_follow_the_image(read: Any, record: dict[str, Any]):
    """An image whose colour tells its segment still does after resize, crop and flip."""
    source = record["sem_seg_file_name"] if read is read_semantic else record["pan_seg_file_name"]
    labels = np.array(Image.open(source).convert("RGB"))
    Image.fromarray(labels).save(record["file_name"])
    augmentations = (T.ResizeTransform(40, 56, 80, 112, Image.NEAREST), T.RandomCrop("absolute", (60, 90)), T.RandomFlip(prob=0.5))
    found = plain(read, *augmentations)(record)
    assert found["image"].shape == (3, 60, 90)
    for mask in found["instances"].gt_masks.tensor:
        assert mask.any()
        colors = found["image"][:, mask]
        assert (colors == colors[:, :1]).all()
        assert not (found["image"][:, ~mask] == colors[:, :1]).all(0).any()


def test_segments_that_leave_the_picture_are_dropped(record: dict[str, Any]):
    found = plain(read_panoptic, T.CropTransform(0, 0, 16, 8))(record)["instances"]
    assert found.gt_classes.tolist() == [1, 2]
    assert found.gt_masks.tensor.flatten(1).sum(1).tolist() == [64, 64]


def test_crops_with_one_dominant_class_are_drawn_again(record: dict[str, Any]):
    classes = np.zeros((40, 56), dtype=np.uint8)
    classes[:, 50:] = 3
    Image.fromarray(classes).save(record["sem_seg_file_name"])
    crop = T.RandomCrop_CategoryAreaConstraint("absolute", (40, 12), 0.75, 255)
    free = T.RandomCrop_CategoryAreaConstraint("absolute", (40, 12), 1.0, 255)
    kept, unconstrained = (
        sum(len(mapper(record)["instances"]) == 2 for _ in range(200))
        for mapper in (plain(read_semantic, crop, constrained=True), plain(read_semantic, free))
    )
    assert kept > unconstrained + 25


def test_annotated_instances_may_overlap(record: dict[str, Any]):
    mask = np.zeros((40, 56), dtype=np.uint8)
    mask[5:20, 10:30] = 1
    rle = pycocotools.mask.encode(np.asfortranarray(mask))
    box = {"bbox": [0, 0, 20, 20], "bbox_mode": BoxMode.XYWH_ABS}
    record["annotations"] = [
        {**box, "category_id": 2, "segmentation": [[0, 0, 20, 0, 20, 20, 0, 20]]},
        {**box, "category_id": 5, "segmentation": rle, "iscrowd": 0},
        {**box, "category_id": 6, "segmentation": rle, "iscrowd": 1},
    ]
    found = plain(None, T.HFlipTransform(56))(record)["instances"]
    assert found.gt_classes.tolist() == [2, 5]
    assert torch.equal(found.gt_masks.tensor[1], torch.from_numpy(mask[:, ::-1].copy()).bool())
    assert (found.gt_masks.tensor[0] & found.gt_masks.tensor[1]).any()
    record["annotations"] = record["annotations"][2:]
    assert plain(None)(record)["instances"].gt_masks.tensor.shape == (0, 40, 56)


@pytest.mark.parametrize(
    ("read", "key"), [(read_semantic, "sem_seg_file_name"), (read_panoptic, "pan_seg_file_name"), (None, "annotations")]
)
def test_records_without_what_the_mapper_reads_are_refused(read: Any, key: str, record: dict[str, Any]):
    record.pop(key, None)
    with pytest.raises(UsageError, match=f"has no '{key}'"):
        plain(read)(record)


@pytest.mark.parametrize("read", [read_semantic, read_panoptic])
def test_classes_that_the_model_does_not_have_are_refused(read: Any, record: dict[str, Any]):
    mapper = plain(read)
    mapper.classes = 8
    with pytest.raises(UsageError, match=r"has class 8; expected 0\.\.7 .*255 where ignored"):
        mapper(record)


def test_labels_of_another_size_are_refused(record: dict[str, Any]):
    Image.fromarray(np.zeros((40, 55), dtype=np.uint8)).save(record["sem_seg_file_name"])
    with pytest.raises(UsageError, match=r"\(40, 55\), expected \(40, 56\)"):
        plain(read_semantic)(record)


@pytest.mark.parametrize(
    ("name", "config", "kinds"),
    [
        (
            "mask_former_semantic",
            SEMANTIC,
            ["ResizeShortestEdge", "RandomCrop_CategoryAreaConstraint", "ColorAugSSDTransform", "RandomFlip"],
        ),
        (
            "mask_former_panoptic",
            PANOPTIC,
            ["ResizeShortestEdge", "RandomCrop_CategoryAreaConstraint", "ColorAugSSDTransform", "RandomFlip"],
        ),
        ("coco_panoptic_lsj", PANOPTIC, ["RandomFlip", "ResizeScale", "FixedSizeCrop"]),
    ],
)
def test_named_mappers(name: str, config: str, kinds: list[str], tiny: Callable[..., CfgNode], ade20k: Path):
    cfg = tiny(config, {"INPUT.DATASET_MAPPER_NAME": name, "INPUT.IMAGE_SIZE": 96})
    mapper = build_mapper(cfg)
    found = [type(getattr(augmentation, "tfm", augmentation)).__name__ for augmentation in mapper.augmentations.augs]
    assert found == kinds
    for record in DatasetCatalog.get(cfg.DATASETS.TRAIN[0]):
        entry = mapper(record)
        assert all(side % (32 if name == "coco_panoptic_lsj" else 64) == 0 for side in entry["image"].shape[1:])
        assert entry["instances"].gt_masks.tensor.flatten(1).any(1).all()
        assert entry["height"] == 64 or name == "mask_former_semantic"
