"""COCO-panoptic files: what is read from JSON and PNG, one clear sentence for what cannot be, and the layouts they come in."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from emca_bench.data import IGNORE, ClassInfo, CocoPanoptic, find_dataset_folder, open_dataset
from emca_bench.data.coco_panoptic import coco_folder, palette
from emca_bench.data.targets import panoptic_targets
from emca_bench.errors import UsageError
from emca_bench.measure.accuracy import check_data

NAMES = ("b_front", "a_side")
CATEGORIES = [{"id": 11, "name": "window", "isthing": 1}, {"id": 40, "name": "wall", "isthing": 0, "color": [1, 2, 3]}]
IDS = (70_001, 258, 16_000_000)
"""More than 8 bits, so that every channel counts."""


def encoded(ids: np.ndarray) -> Image.Image:
    return Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8))


def truth_map() -> np.ndarray:
    ids = np.zeros((12, 16), np.int64)
    ids[:4], ids[4:8, :5], ids[8:, 8:] = IDS
    return ids


def write_split(folder: Path, split: str, change: Callable[[dict[str, Any]], object] = lambda data: None) -> Path:
    """images/<split>, panoptic_<split>.json and PNGs of two images: a wall, a window and a crowd of windows."""
    (folder / "images" / split).mkdir(parents=True)
    (folder / f"panoptic_{split}").mkdir()
    segments = [
        {"id": IDS[0], "category_id": 40, "iscrowd": 0},
        {"id": IDS[1], "category_id": 11, "iscrowd": 0},
        {"id": IDS[2], "category_id": 11, "iscrowd": 1},
    ]
    data: dict[str, Any] = {"images": [], "annotations": [], "categories": [dict(entry) for entry in CATEGORIES]}
    for number, name in enumerate(NAMES, start=5):
        Image.new("RGB", (16, 12), (9, 8, 7)).save(folder / "images" / split / f"{name}.jpg")
        encoded(truth_map()).save(folder / f"panoptic_{split}" / f"{name}.png")
        data["images"].append({"id": number, "file_name": f"{name}.jpg", "height": 12, "width": 16})
        data["annotations"].append({"image_id": number, "file_name": f"{name}.png", "segments_info": [dict(entry) for entry in segments]})
    change(data)
    (folder / f"panoptic_{split}.json").write_text(json.dumps(data))
    return folder


def read(folder: Path, split: str = "val") -> CocoPanoptic:
    return CocoPanoptic("fronts", split, annotations=folder / f"panoptic_{split}.json", images=folder / "images" / split)


def expect(message: str, act: Callable[[], object]) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as raised:
        act()
    assert "\n" not in str(raised.value)


def test_samples_have_ids_segments_and_classes(tmp_path: Path):
    dataset = read(write_split(tmp_path, "val"))
    assert [sample.name for sample in dataset] == sorted(NAMES)
    assert [(info.name, info.thing) for info in dataset.classes] == [("window", True), ("wall", False)]
    assert dataset.classes[1].color == (1, 2, 3)
    sample = dataset[0]
    assert (sample.panoptic == truth_map()).all()
    assert sample.image.shape == (12, 16, 3)
    assert [(entry.id, entry.category, entry.thing, entry.iscrowd) for entry in sample.segments] == [
        (IDS[0], 1, False, False),
        (IDS[1], 0, True, False),
        (IDS[2], 0, True, True),
    ]
    expected = np.full((12, 16), IGNORE)
    expected[:4], expected[4:8, :5], expected[8:, 8:] = 1, 0, 0
    assert (sample.semantic == expected).all()


def test_crowds_are_no_target_of_training(tmp_path: Path):
    targets = panoptic_targets(read(write_split(tmp_path, "val"))[0])
    assert targets.labels.tolist() == [1, 0]
    assert targets.masks.sum((1, 2)).tolist() == [64, 20]
    assert int(targets.valid.sum()) == 84


def test_given_classes_set_the_order(tmp_path: Path):
    write_split(tmp_path, "val")
    classes = [ClassInfo("door", True, (0, 0, 0)), ClassInfo("wall", False, (9, 9, 9)), ClassInfo("window", True, (5, 5, 5))]
    arguments: dict[str, Any] = {"annotations": tmp_path / "panoptic_val.json", "images": tmp_path / "images" / "val"}
    dataset = CocoPanoptic("fronts", "val", **arguments, classes=classes)
    assert [entry.category for entry in dataset[0].segments] == [1, 2, 2]
    expect("has the category 'window' (did you mean 'windows'?); known: wall, windows", lambda: CocoPanoptic(
        "fronts", "val", **arguments, classes=[ClassInfo("windows", True, (0, 0, 0)), classes[1]]
    ))  # fmt: skip


def test_classes_do_not_depend_on_the_order_in_which_a_split_lists_them(tmp_path: Path):
    write_split(tmp_path, "train")
    write_split(tmp_path, "val", lambda data: data["categories"].reverse())
    one, other = read(tmp_path, "train"), read(tmp_path, "val")
    assert one.classes == other.classes
    assert [info.name for info in one.classes] == ["window", "wall"]
    np.testing.assert_array_equal(one.read(0).semantic, other.read(0).semantic)


def test_splits_of_other_classes_cannot_be_trained_and_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_split(tmp_path / "fronts", "train")
    write_split(tmp_path / "fronts", "val", lambda data: data["categories"][1].update(name="brick"))
    monkeypatch.setenv("EMCA_DATASETS", str(tmp_path))
    cell = {"dataset": "fronts", "test_split": "val", "image_size": "64x64", "steps": 1, "batch": 1, "seed": 0}
    expect("dataset 'fronts': class 1 of split 'val' is 'brick', expected 'wall' as in 'train'", lambda: check_data(cell))
    check_data({**cell, "test_split": "train"})


def test_the_fingerprint_follows_the_data_and_not_the_place(tmp_path: Path):
    one, other = (write_split(tmp_path / name, "val") for name in ("one", "other"))
    before = read(one).fingerprint()
    assert read(other).fingerprint() == before
    (other / "panoptic_val.json").write_text((other / "panoptic_val.json").read_text().replace('"iscrowd": 1', '"iscrowd": 0'))
    assert read(other).fingerprint() != before


def test_missing_files(tmp_path: Path):
    folder = write_split(tmp_path, "val")
    png = folder / "panoptic_val" / "a_side.png"
    png.unlink()
    expect(f"panoptic_val.json names the map {png}, which is not there", lambda: read(folder))
    (folder / "images" / "val" / "a_side.jpg").unlink()
    (folder / "images" / "val" / "b_front.jpg").unlink()
    expect("a_side.jpg (and 1 more), which is not there", lambda: read(folder))
    (folder / "images" / "val").rmdir()
    expect(f"no images of fronts val: the folder {folder / 'images' / 'val'} does not exist", lambda: read(folder))
    expect("panoptic_train.json cannot be read: No such file or directory", lambda: read(folder, "train"))


def test_ids_that_only_map_or_only_list_has(tmp_path: Path):
    less = write_split(tmp_path / "less", "val", lambda data: data["annotations"][1]["segments_info"].pop())
    expect(f"map {less / 'panoptic_val' / 'a_side.png'} has pixels of segment {IDS[2]}, which", lambda: read(less)[0])
    extra = {"id": 3, "category_id": 11}
    more = write_split(tmp_path / "more", "val", lambda data: data["annotations"][1]["segments_info"].append(extra))
    expect(f"lists segment 3, of which map {more / 'panoptic_val' / 'a_side.png'} has no pixel", lambda: read(more)[0])
    twice = {"id": IDS[0], "category_id": 11}
    double = write_split(tmp_path / "double", "val", lambda data: data["annotations"][1]["segments_info"].append(twice))
    expect("lists a segment of 'a_side.png' twice", lambda: read(double)[0])


def test_unknown_category(tmp_path: Path):
    folder = write_split(tmp_path, "val", lambda data: data["annotations"][0]["segments_info"][1].update(category_id=12))
    expect("segment 258 of 'b_front.png' has the unknown category 12; known: 11, 40", lambda: read(folder))


def test_map_of_another_size(tmp_path: Path):
    folder = write_split(tmp_path, "val")
    encoded(truth_map().T).save(folder / "panoptic_val" / "a_side.png")
    expect("semantic labels of 'a_side' are 16x12 (HxW); expected 12x16 as its image", lambda: read(folder)[0])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_torn_files(tmp_path: Path, share: float):
    folder = write_split(tmp_path, "val")
    dataset = read(folder)
    for path in (folder / "panoptic_val" / "a_side.png", folder / "images" / "val" / "b_front.jpg", folder / "panoptic_val.json"):
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
    expect(f"cannot decode {folder / 'panoptic_val' / 'a_side.png'}", lambda: dataset[0])
    expect(f"cannot decode {folder / 'images' / 'val' / 'b_front.jpg'}", lambda: dataset[1])
    expect("is not valid JSON", lambda: read(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("annotations"), "it lacks annotations"),
        (lambda data: data["annotations"][0].pop("segments_info"), "KeyError: 'segments_info'"),
        (lambda data: data["annotations"][0].update(image_id=99), "KeyError: 99"),
        (lambda data: data.update(categories=[]), "has 0 categories"),
        (lambda data: data.update(annotations=[]), "lists no annotated image"),
    ],
)
def test_other_json(tmp_path: Path, change, message: str):
    expect(message, lambda: read(write_split(tmp_path, "val", change)))


def test_a_folder_of_ones_own_is_a_dataset_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for split in ("train", "val"):
        write_split(tmp_path / "fronts", split)
    monkeypatch.setenv("EMCA_DATASETS", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    dataset = open_dataset("fronts", "train")
    assert (dataset.name, dataset.split, len(dataset)) == ("fronts", "train", 2)
    expect("panoptic_test.json cannot be read", lambda: open_dataset("fronts", "test"))
    expect("unknown dataset 'front'", lambda: open_dataset("front", "train"))
    expect("unknown dataset '../fronts'", lambda: open_dataset("../fronts", "train"))


def test_the_first_variable_goes_before_the_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("one", "two"):
        write_split(
            tmp_path / name / "fronts",
            "val",
            lambda data, name=name: data.update(categories=[{**CATEGORIES[0], "name": name}, CATEGORIES[1]]),
        )
    monkeypatch.setenv("EMCA_DATASETS", str(tmp_path / "one"))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "two"))
    assert open_dataset("fronts", "val").classes[0].name == "one"


@pytest.mark.parametrize("beside", ["images", "json"])
def test_cocos_own_layout(tmp_path: Path, beside: str):
    folder = write_split(tmp_path / "coco", "val")
    (folder / "images" / "val").rename(folder / "val2017")
    (folder / "annotations").mkdir()
    (folder / "panoptic_val.json").rename(folder / "annotations" / "panoptic_val2017.json")
    (folder / "panoptic_val").rename((folder if beside == "images" else folder / "annotations") / "panoptic_val2017")
    assert len(open_dataset("coco", "val", root=tmp_path)) == 2
    expect(
        "unknown split 'vale' of dataset 'coco' (did you mean 'val'?); known: train, val",
        lambda: open_dataset("coco", "vale", root=tmp_path),
    )
    expect("no annotations of coco train; looked for", lambda: open_dataset("coco", "train", root=tmp_path))


def test_colours_of_neighbours_differ():
    colors = np.array(palette(150))
    assert len(np.unique(colors, axis=0)) == 150
    for distance in (1, 2, 3):
        assert np.abs(colors[distance:] - colors[:-distance]).sum(1).min() > 60


REAL = pytest.mark.skipif(not os.environ.get("EMCA_DATASETS"), reason="EMCA_DATASETS is not set")


@pytest.mark.datasets
@REAL
def test_real_facade():
    train, val, test = (open_dataset("facade", split) for split in ("train", "val", "test"))
    assert [len(train), len(val), len(test)] == [280, 60, 60]
    samples = list(test)
    assert sum(len(sample.segments) for sample in samples) == 1726
    assert sum(segment.thing for sample in samples for segment in sample.segments) == 1555
    folder = find_dataset_folder("facade", None) / "annotations" / "test"
    for sample in samples[:5]:
        assert (sample.semantic == np.array(Image.open(folder / f"{sample.name}.png"))).all()


@pytest.mark.datasets
@REAL
def test_real_coco():
    dataset = coco_folder(find_dataset_folder("coco_sample", None), "val")
    samples = list(dataset)
    assert len(dataset.classes) == 133
    assert sum(info.thing for info in dataset.classes) == 80
    assert sum(len(sample.segments) for sample in samples) == 50
    assert sum(segment.thing for sample in samples for segment in sample.segments) == 43
    assert dataset.classes[0].color == (220, 20, 60)
