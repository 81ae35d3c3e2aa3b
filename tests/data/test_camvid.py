"""Folders of images and index PNGs: what is read, and one clear sentence for everything that cannot be."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emca_bench.data import IGNORE, ClassInfo, SemanticFolder, open_dataset
from emca_bench.errors import UsageError

NAMES = ("b_frame", "a_frame")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A CamVid tree of two images of 24x32 pixels in each split, every class present."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for kind in ("images", "annotations"):
            (tmp_path / "camvid" / kind / split).mkdir(parents=True)
        for name in NAMES:
            labels = (np.arange(24 * 32) % 12).astype(np.uint8).reshape(24, 32)
            labels[labels == 11] = IGNORE
            Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(image_path(tmp_path, split, name))
            Image.fromarray(labels).save(label_path(tmp_path, split, name))
    return tmp_path


def image_path(root: Path, split: str = "train", name: str = "a_frame") -> Path:
    return root / "camvid" / "images" / split / f"{name}.jpg"


def label_path(root: Path, split: str = "train", name: str = "a_frame") -> Path:
    return root / "camvid" / "annotations" / split / f"{name}.png"


def expect_on_opening(message: str, root: Path) -> None:
    """Opening must fail with one line that holds the message."""
    with pytest.raises(UsageError, match=re.escape(message)) as raised:
        open_dataset("camvid", "train", root=root)
    assert "\n" not in str(raised.value)


def expect_on_reading(message: str, root: Path) -> None:
    """Opening must succeed, and reading the first sample fail with one line that holds the message."""
    dataset = open_dataset("camvid", "train", root=root)
    with pytest.raises(UsageError, match=re.escape(message)) as raised:
        dataset[0]
    assert "\n" not in str(raised.value)


def test_samples_come_in_the_order_of_names_with_their_labels(root: Path) -> None:
    dataset = open_dataset("camvid", "val", root=str(root))
    assert [sample.name for sample in dataset] == sorted(NAMES)
    sample = dataset[0]
    assert (sample.image.shape, sample.image.dtype) == ((24, 32, 3), np.uint8)
    assert (sample.semantic == np.array(Image.open(label_path(root, "val")))).all()
    assert set(np.unique(sample.semantic)) == {*range(11), IGNORE}
    assert sample.panoptic is None
    assert [info.name for info in dataset.classes][3] == "road"
    assert dataset.classes[3].color == (128, 64, 128)


def test_the_environment_gives_several_places(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMCA_DATASETS", os.pathsep.join([str(tmp_path / "elsewhere"), str(root)]))
    assert len(open_dataset("camvid", "test")) == 2


def test_the_fingerprint_follows_the_data_and_not_the_place(root: Path, tmp_path: Path) -> None:
    before = open_dataset("camvid", "train", root=root).fingerprint()
    moved = root / "moved"
    moved.mkdir()
    (root / "camvid").rename(moved / "camvid")
    assert open_dataset("camvid", "train", root=moved).fingerprint() == before
    assert open_dataset("camvid", "val", root=moved).fingerprint() != before
    with image_path(moved).open("ab") as file:
        file.write(b"\0")
    assert open_dataset("camvid", "train", root=moved).fingerprint() != before


def test_another_layout_needs_a_class_table_alone(tmp_path: Path) -> None:
    (tmp_path / "left" / "day").mkdir(parents=True)
    (tmp_path / "truth" / "day").mkdir(parents=True)
    Image.new("RGB", (6, 4), (9, 8, 7)).save(tmp_path / "left" / "day" / "x_left.png")
    Image.new("P", (6, 4), 1).save(tmp_path / "truth" / "day" / "x_ids.png")
    classes = [ClassInfo("land", False, (0, 9, 0)), ClassInfo("ship", True, (9, 0, 0))]
    dataset = SemanticFolder(
        "sea",
        "day",
        classes,
        folder=tmp_path,
        splits=("day", "night"),
        images="left/{split}",
        labels="truth/{split}",
        image_suffix="_left.png",
        label_suffix="_ids.png",
    )
    assert dataset[0].name == "x"
    assert (dataset[0].image == (9, 8, 7)).all()
    assert (dataset[0].semantic == 1).all()


def test_unset_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("EMCA_DATASETS", "DETECTRON2_DATASETS"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UsageError, match="dataset 'camvid' needs a place: EMCA_DATASETS is not set"):
        open_dataset("camvid", "train")


def test_missing_dataset_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_on_opening(f"looked for the folder {tmp_path / 'camvid'}", tmp_path)
    monkeypatch.setenv("EMCA_DATASETS", os.pathsep.join([str(tmp_path / "one"), str(tmp_path / "two")]))
    with pytest.raises(UsageError, match=r"one/camvid and .*two/camvid"):
        open_dataset("camvid", "train")


def test_missing_or_empty_split_folder(root: Path) -> None:
    for path in image_path(root).parent.iterdir():
        path.unlink()
    expect_on_opening(f"no images of camvid train: the folder {image_path(root).parent} holds no file that ends with '.jpg'", root)
    image_path(root).parent.rmdir()
    expect_on_opening(f"no images of camvid train: the folder {image_path(root).parent} does not exist", root)


def test_unknown_split(root: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown split 'tests' of dataset 'camvid' \(did you mean 'test'\?\)"):
        open_dataset("camvid", "tests", root=root)


def test_image_without_labels(root: Path) -> None:
    label_path(root).unlink()
    expect_on_opening(f"{image_path(root)} has no labels '.png' of the same name in {label_path(root).parent}", root)


def test_labels_without_image(root: Path) -> None:
    Image.new("L", (32, 24)).save(label_path(root, name="c_frame"))
    Image.new("L", (32, 24)).save(label_path(root, name="d_frame"))
    lone = label_path(root, name="c_frame")
    expect_on_opening(f"{lone} (and 1 more) has no image '.jpg' of the same name in {image_path(root).parent}", root)


def test_labels_of_another_size(root: Path) -> None:
    Image.new("L", (24, 32)).save(label_path(root))
    expect_on_reading("semantic labels of 'a_frame' are 32x24 (HxW); expected 24x32 as its image", root)


def test_unknown_class_ids(root: Path) -> None:
    labels = np.zeros((24, 32), np.uint8)
    labels[0, :5], labels[3, 3] = 11, 254
    Image.fromarray(labels).save(label_path(root))
    expect_on_reading(
        f"labels {label_path(root)} hold unknown class ids: 11 (5 pixels), 254 (1 pixels); expected 0..10 or 255 for ignore", root
    )


def test_colour_labels(root: Path) -> None:
    Image.new("RGB", (32, 24)).save(label_path(root))
    expect_on_reading(f"labels {label_path(root)} have the pixel mode 'RGB'; expected one channel of 8 bits", root)


@pytest.mark.parametrize("path_of", [image_path, label_path], ids=["jpeg", "png"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.6])
def test_truncated_files(root: Path, path_of, share: float) -> None:
    path = path_of(root)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    expect_on_reading(f"cannot decode {path}", root)


@pytest.mark.parametrize("path_of", [image_path, label_path], ids=["jpeg", "png"])
def test_corrupt_files(root: Path, path_of) -> None:
    path = path_of(root)
    path.write_bytes(b"no picture" * 40)
    expect_on_reading(f"cannot decode {path} (400 bytes)", root)


@pytest.mark.datasets
@pytest.mark.skipif(not os.environ.get("EMCA_DATASETS"), reason="EMCA_DATASETS is not set")
def test_real_camvid() -> None:
    train, val, test = (open_dataset("camvid", split) for split in ("train", "val", "test"))
    assert [len(train), len(val), len(test)] == [367, 101, 233]
    pixels = sum(np.bincount(sample.semantic.ravel(), minlength=256) for sample in train)
    labelled = pixels[: len(train.classes)]
    road = [info.name for info in train.classes].index("road")
    assert labelled[road] / labelled.sum() == pytest.approx(0.33, abs=0.005)
    assert train[0].size == (360, 480)
