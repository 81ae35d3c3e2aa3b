"""Cityscapes' layout with generated images: label ids, train ids, instance ids and prepared panoptic files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emca_bench.data import IGNORE, Segment, open_dataset
from emca_bench.data.cityscapes import CLASSES, LABEL_IDS
from emca_bench.errors import UsageError

STEM = "aachen_000000_000019"
# road, building, an unlabelled part, two cars, a group of cars, a caravan (not evaluated)
IDS = np.array([[7, 7, 11, 0], [26000, 26001, 26, 29000]], dtype=np.uint16)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One image of 2x4 pixels with instance and label ids, in the city of Aachen."""
    images, labels = (tmp_path / "cityscapes" / kind / "val" / "aachen" for kind in ("leftImg8bit", "gtFine"))
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    Image.new("RGB", (4, 2), (1, 2, 3)).save(images / f"{STEM}_leftImg8bit.png")
    Image.fromarray(IDS).save(labels / f"{STEM}_gtFine_instanceIds.png")
    Image.fromarray(np.where(IDS < 1000, IDS, IDS // 1000).astype(np.uint8)).save(labels / f"{STEM}_gtFine_labelIds.png")
    return tmp_path


EXPECTED = [[0, 0, 2, IGNORE], [13, 13, 13, IGNORE]]


def labels(root: Path, kind: str) -> Path:
    return root / "cityscapes" / "gtFine" / "val" / "aachen" / f"{STEM}_gtFine_{kind}.png"


def test_label_ids_become_train_ids(root: Path):
    dataset = open_dataset("cityscapes", "val", root=root)
    assert [sample.name for sample in dataset] == [STEM]
    assert dataset[0].semantic.tolist() == EXPECTED
    assert dataset[0].image[0, 0].tolist() == [1, 2, 3]
    assert len(CLASSES) == len(LABEL_IDS) == 19
    assert sum(info.thing for info in CLASSES) == 8


def test_train_ids_are_preferred(root: Path):
    Image.new("L", (4, 2), 5).save(labels(root, "labelTrainIds"))
    assert (open_dataset("cityscapes", "val", root=root)[0].semantic == 5).all()


def test_instance_ids_give_things_stuff_and_crowds(root: Path):
    sample = open_dataset("cityscapes_panoptic", "val", root=root)[0]
    assert sample.semantic.tolist() == EXPECTED
    assert sample.panoptic is not None
    assert sample.panoptic.tolist() == [[7, 7, 11, 0], [26000, 26001, 26, 0]]
    assert set(sample.segments) == {
        Segment(7, 0, False),
        Segment(11, 2, False),
        Segment(26, 13, True, iscrowd=True),
        Segment(26000, 13, True),
        Segment(26001, 13, True),
    }


def test_prepared_panoptic_files_are_preferred(root: Path):
    folder = root / "cityscapes" / "gtFine"
    (folder / "cityscapes_panoptic_val").mkdir()
    ids = np.stack([IDS % 256, IDS // 256, 0 * IDS], -1).astype(np.uint8)
    ids[0, 3] = ids[1, 3] = 0
    Image.fromarray(ids).save(folder / "cityscapes_panoptic_val" / f"{STEM}_gtFine_panoptic.png")
    segments = [(7, 7, 0), (11, 11, 0), (26, 26, 1), (26000, 26, 0), (26001, 26, 0)]
    data = {
        "images": [{"id": STEM, "file_name": f"{STEM}_gtFine_leftImg8bit.png", "height": 2, "width": 4}],
        "categories": [
            {"id": label, "name": info.name, "isthing": int(info.thing)} for label, info in zip(LABEL_IDS, CLASSES, strict=True)
        ],
        "annotations": [
            {
                "image_id": STEM,
                "file_name": f"{STEM}_gtFine_panoptic.png",
                "segments_info": [{"id": id_, "category_id": category, "iscrowd": crowd} for id_, category, crowd in segments],
            }
        ],
    }
    (folder / "cityscapes_panoptic_val.json").write_text(json.dumps(data))
    prepared = open_dataset("cityscapes_panoptic", "val", root=root)[0]
    (folder / "cityscapes_panoptic_val.json").unlink()
    own = open_dataset("cityscapes_panoptic", "val", root=root)[0]
    assert set(prepared.segments) == set(own.segments)
    assert (prepared.semantic == own.semantic).all()
    assert (prepared.panoptic == own.panoptic).all()


def test_what_is_wrong_is_named(root: Path):
    with pytest.raises(UsageError, match="unknown split 'test' of dataset 'cityscapes'; known: train, val"):
        open_dataset("cityscapes", "test", root=root)
    Image.fromarray(np.where(IDS == 7, 34, IDS).astype(np.uint16)).save(labels(root, "instanceIds"))
    with pytest.raises(UsageError, match=r"instanceIds.png hold the unknown id 34; expected label ids 0\.\.33"):
        open_dataset("cityscapes_panoptic", "val", root=root)[0]
    labels(root, "instanceIds").write_bytes(b"no picture")
    with pytest.raises(UsageError, match=r"cannot decode .*instanceIds.png \(10 bytes\)"):
        open_dataset("cityscapes_panoptic", "val", root=root)[0]
    Image.fromarray(np.full((2, 4), 70000, np.int32)).save(labels(root, "instanceIds"), format="TIFF")
    with pytest.raises(UsageError, match=r"have values in 70000\.\.70000; expected one channel of 16 bits"):
        open_dataset("cityscapes_panoptic", "val", root=root)[0]
    Image.new("RGB", (4, 2)).save(labels(root, "instanceIds"))
    with pytest.raises(UsageError, match="have the pixel mode 'RGB'; expected one channel of 16 bits"):
        open_dataset("cityscapes_panoptic", "val", root=root)[0]
    labels(root, "labelIds").unlink()
    with pytest.raises(
        UsageError, match=r"no labels of cityscapes val: the folder .*val holds no file that ends with '_gtFine_labelIds.png'"
    ):
        open_dataset("cityscapes", "val", root=root)
