"""ADE20K's layout, with generated images and with a sample of the real ones."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emca_bench.data import IGNORE, find_dataset_folder, open_dataset
from emca_bench.data.ade20k import ade20k_folder, ade20k_panoptic_folder
from emca_bench.errors import UsageError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One image in each split, of which each pixel row has the next class, from 0 for other."""
    folder = tmp_path / "ADEChallengeData2016"
    lines = [f"{number}\t0.1\t1\t1\tclass {number}, or so " for number in range(1, 151)]
    folder.mkdir()
    (folder / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *lines]) + "\n")
    raw = np.repeat(np.arange(151, dtype=np.uint8)[:, None], 8, 1)
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True)
        Image.new("RGB", (8, 151)).save(folder / "images" / split / f"ADE_{split}_1.jpg")
        Image.fromarray(raw).save(folder / "annotations" / split / f"ADE_{split}_1.png")
    return tmp_path


def test_labels_are_one_less_and_other_is_ignored(root: Path):
    dataset = open_dataset("ade20k", "val", root=root)
    assert dataset[0].semantic[:, 0].tolist() == [IGNORE, *range(150)]
    assert dataset.classes[149].name == "class 150, or so"
    assert sum(info.thing for info in dataset.classes) == 100


def test_labels_made_by_detectron2_are_read_as_they_are(root: Path):
    folder = root / "ADEChallengeData2016"
    raw = np.array(Image.open(folder / "annotations" / "training" / "ADE_training_1.png"))
    (folder / "annotations").rename(folder / "annotations_detectron2")
    Image.fromarray(raw - np.uint8(1)).save(folder / "annotations_detectron2" / "training" / "ADE_training_1.png")
    assert open_dataset("ade20k", "train", root=root)[0].semantic[:, 0].tolist() == [IGNORE, *range(150)]


def test_values_beyond_the_classes_are_named(root: Path):
    Image.new("L", (8, 151), 255).save(root / "ADEChallengeData2016" / "annotations" / "validation" / "ADE_validation_1.png")
    with pytest.raises(UsageError, match=r"unknown class ids: 255 \(1208 pixels\); expected 0\.\.150$"):
        open_dataset("ade20k", "val", root=root)[0]


def test_what_is_missing_is_named(root: Path, tmp_path: Path):
    folder = root / "ADEChallengeData2016"
    with pytest.raises(UsageError, match=r"unknown split 'test' of dataset 'ade20k'.*; known: train, val"):
        open_dataset("ade20k", "test", root=root)
    with pytest.raises(UsageError, match=re.escape(f"looked for the folder {tmp_path / 'no' / 'ADEChallengeData2016'}")):
        open_dataset("ade20k", "val", root=tmp_path / "no")
    (folder / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n")
    with pytest.raises(UsageError, match=r"objectInfo150.txt is not ADE20K's list of classes: 1 lines found"):
        open_dataset("ade20k", "val", root=root)
    (folder / "annotations" / "validation" / "ADE_validation_1.png").unlink()
    (folder / "annotations" / "validation").rmdir()
    with pytest.raises(
        UsageError, match=r"no labels of ade20k val; looked for .*annotations.validation and .*annotations_detectron2.validation"
    ):
        open_dataset("ade20k", "val", root=root)


def test_panoptic_files_of_mask2formers_scripts(root: Path):
    folder = root / "ADEChallengeData2016"
    (folder / "ade20k_panoptic_val").mkdir()
    ids = np.zeros((151, 8, 3), np.uint8)
    ids[:50, :, 1] = 2
    Image.fromarray(ids).save(folder / "ade20k_panoptic_val" / "ADE_validation_1.png")
    annotation = {"image_id": "ADE_validation_1", "file_name": "ADE_validation_1.png"}
    data = {
        "images": [{"id": "ADE_validation_1", "file_name": "ADE_validation_1.jpg", "height": 151, "width": 8}],
        "categories": [{"id": index, "name": str(index), "isthing": int(index > 9), "color": [index, 0, 0]} for index in range(150)],
        "annotations": [{**annotation, "segments_info": [{"id": 512, "category_id": 30, "iscrowd": 0, "area": 400}]}],
    }
    (folder / "ade20k_panoptic_val.json").write_text(json.dumps(data))
    sample = open_dataset("ade20k_panoptic", "val", root=root)[0]
    assert (sample.semantic[:50] == 30).all()
    assert sample.segments[0].thing
    with pytest.raises(UsageError, match="no annotations of ade20k_panoptic train; looked for"):
        open_dataset("ade20k_panoptic", "train", root=root)


@pytest.mark.datasets
@pytest.mark.skipif(not os.environ.get("EMCA_DATASETS"), reason="EMCA_DATASETS is not set")
def test_real_ade20k():
    folder = find_dataset_folder("ade20k_sample", None)
    val = ade20k_folder(folder, "val")
    assert [sample.name for sample in val] == ["ADE_val_00000001", "ADE_val_00000002", "ADE_val_00000003"]
    assert val.classes[0].name == "wall"
    for sample in val:
        prepared = np.array(Image.open(folder / "annotations_detectron2" / "validation" / f"{sample.name}.png"))
        assert (sample.semantic == prepared).all()
    panoptic = ade20k_panoptic_folder(folder, "train")
    assert len(panoptic) == 3
    assert [info.thing for info in panoptic.classes] == [info.thing for info in val.classes]
    assert [info.name for info in panoptic.classes] == [info.name for info in val.classes]
    semantic = {sample.name: sample for sample in ade20k_folder(folder, "train")}
    for sample in panoptic:
        known = sample.semantic != IGNORE
        assert (semantic[sample.name].semantic[known] == sample.semantic[known]).mean() > 0.99
