"""`data check` and `data preview`: what is counted, what is found broken, what is drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from emca_bench.cli import main
from emca_bench.data import IGNORE, ClassInfo, Scenes
from emca_bench.data.check import check_folder, describe
from emca_bench.data.folder import decode
from emca_bench.data.targets import Targets
from emca_bench.errors import UsageError
from emca_bench.train.preview import IGNORED, drawn_targets, preview
from emca_bench.train.recipe import Recipe


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    """Two images in train, one in val; random pixels, classes 0 and 3 and ignored ones."""
    rng = np.random.default_rng(torch.randint(2**31, ()).item())
    folder = tmp_path / "camvid"
    for split, names in (("train", ("a", "b")), ("val", ("c",))):
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True)
        for name in names:
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / "images" / split / f"{name}.jpg")
            labels = np.zeros((20, 30), np.uint8)
            labels[5:10], labels[10:12] = 3, IGNORE
            Image.fromarray(labels).save(folder / "annotations" / split / f"{name}.png")
    return folder


def test_counts_are_those_of_the_files(camvid: Path):
    train, val = check_folder(camvid)
    assert (train.split, train.images, train.read, train.problems, train.sizes) == ("train", 2, 2, [], [(20, 30)])
    assert (train.pixels[0], train.pixels[3], train.pixels[IGNORE], train.pixels.sum()) == (780, 300, 120, 1200)
    assert (train.present[0], train.present[3], train.present[1]) == (2, 2, 0)
    text = "\n".join(describe(train))
    assert "camvid train: 2 of 2 images read, all 20x30" in text
    assert "25.000% of the pixels, in     2 images" in text
    assert "classes that no image has: building" in text
    assert val.read == 1


def truncate(folder: Path) -> None:
    path = folder / "images" / "train" / "a.jpg"
    path.write_bytes(path.read_bytes()[:300])


def remove_image(folder: Path) -> None:
    (folder / "images" / "train" / "a.jpg").unlink()


def unknown_class(folder: Path) -> None:
    Image.fromarray(np.full((20, 30), 42, np.uint8)).save(folder / "annotations" / "train" / "a.png")


def sixteen_bit_labels(folder: Path) -> None:
    Image.fromarray(np.zeros((20, 30), np.uint16)).save(folder / "annotations" / "train" / "a.png")


def colour_labels(folder: Path) -> None:
    Image.fromarray(np.zeros((20, 30, 4), np.uint8)).save(folder / "annotations" / "train" / "a.png")


def other_size(folder: Path) -> None:
    Image.fromarray(np.zeros((20, 31), np.uint8)).save(folder / "annotations" / "train" / "a.png")


def copy_into_val(folder: Path) -> None:
    (folder / "images" / "val" / "c.jpg").write_bytes((folder / "images" / "train" / "b.jpg").read_bytes())


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (truncate, ["cannot decode", "a.jpg"]),
        (remove_image, ["a.png", "has no image"]),
        (unknown_class, ["a.png", "unknown class ids: 42 (600 pixels)"]),
        (sixteen_bit_labels, ["a.png", "I;16", "one channel of 8 bits"]),
        (colour_labels, ["a.png", "RGBA", "one channel of 8 bits"]),
        (other_size, ["'a'", "20x31", "20x30"]),
        (copy_into_val, ["an image is in train too", "'c'"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_broken_is_named_and_the_rest_is_read(
    camvid: Path, capsys: pytest.CaptureFixture[str], break_it: Callable[[Path], None], words: list[str]
):
    break_it(camvid)
    assert main(["data", "check", str(camvid)]) == 1
    printed = capsys.readouterr().out
    [problem] = [line for line in printed.splitlines() if "PROBLEM" in line]
    assert all(word in problem for word in words), problem
    assert printed.endswith("1 problem\n")
    assert "camvid val: 1 of 1 images read" in printed


def test_a_sound_folder_has_no_problems(camvid: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "check", str(camvid), "--limit", "1"]) == 0
    assert "camvid train: 1 of 2 images read" in capsys.readouterr().out


def test_an_image_without_objects_is_told(camvid: Path):
    Image.fromarray(np.full((20, 30), IGNORE, np.uint8)).save(camvid / "annotations" / "train" / "a.png")
    train, _ = check_folder(camvid)
    assert train.unlabelled == ["a"]
    assert train.problems == []


def test_segments_of_ones_own_folder(tmp_path: Path):
    folder = tmp_path / "mine"
    (folder / "images" / "train").mkdir(parents=True)
    (folder / "panoptic_train").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "images" / "train" / "a.jpg")
    ids = np.zeros((8, 8, 3), np.uint8)
    ids[:4, :, 0], ids[4:, :4, 0] = 1, 2
    Image.fromarray(ids).save(folder / "panoptic_train" / "a.png")
    table = {
        "categories": [{"id": 5, "name": "cat", "isthing": 1}],
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": [{"id": 1, "category_id": 5}, {"id": 2, "category_id": 5}]}],
    }
    (folder / "panoptic_train.json").write_text(json.dumps(table))
    [train] = check_folder(folder)
    assert (train.layout, train.segments[0], train.pixels[0], train.pixels[IGNORE]) == ("own", 2, 48, 16)
    table["annotations"][0]["segments_info"][1]["id"] = 3
    (folder / "panoptic_train.json").write_text(json.dumps(table))
    [train] = check_folder(folder)
    assert "pixels of segment 2, which" in train.problems[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "absent"], "absent is no folder"),
        (["check", "."], "has no layout that is known"),
        (["check", ".", "--layout", "camvit"], "unknown layout 'camvit' (did you mean 'camvid'?)"),
        (["check", ".", "--limit", "-1"], "--limit -1"),
        (["preview", "."], "expected the PNG file to write"),
        (["preview", ".", "--out", "a.jpg"], "a.jpg: expected the PNG file to write"),
    ],
)
def test_wrong_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str):
    monkeypatch.chdir(tmp_path)
    assert main(["data", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_grey_transparent_and_deep_images_are_seen_as_they_are(tmp_path: Path):
    """The same picture in every mode; 16 bits keep their high byte, as Pillow does with colours."""
    grey = np.random.default_rng(torch.randint(2**31, ()).item()).integers(0, 256, (5, 7), dtype=np.uint8)
    colored = np.repeat(grey[..., None], 3, -1)
    deep = grey.astype(np.uint16) * 256 + 77
    pictures = {
        "L": Image.fromarray(grey),
        "RGB": Image.fromarray(colored),
        "RGBA": Image.fromarray(np.dstack([colored, 255 - grey])),
        "LA": Image.fromarray(grey).convert("LA"),
        "P": Image.fromarray(grey).convert("P"),
        "16": Image.fromarray(deep),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / f"{name}.png")
        assert (decode(tmp_path / f"{name}.png", "RGB") == colored).all(), name


def test_values_beyond_16_bits_are_refused(tmp_path: Path):
    Image.fromarray(np.full((3, 3), 70000, np.int32)).save(tmp_path / "a.tiff")
    with pytest.raises(UsageError, match=r"70000\.\.70000; expected 8 or 16 bits"):
        decode(tmp_path / "a.tiff", "RGB")


def test_targets_are_drawn_where_they_are():
    masks = torch.zeros(1, 16, 16, dtype=torch.bool)
    masks[0, :8] = True
    classes = [ClassInfo("a", False, (0, 0, 0)), ClassInfo("b", True, (0, 200, 0))]
    drawn = drawn_targets(np.zeros((16, 16, 3), np.uint8), Targets(torch.tensor([1]), masks, masks[0]), classes)
    assert drawn[2, 3].tolist() == [0, 110, 0]
    assert (drawn[8] == 255).all() or (drawn[8, 1] == 255).all()
    below = drawn[9:].reshape(-1, 3)
    assert {tuple(pixel) for pixel in below.tolist()} == {(0, 0, 0), IGNORED}


def test_a_preview_is_the_first_step_of_a_training(tmp_path: Path):
    scenes = Scenes("train", size=(64, 64), count=3)
    page = preview(scenes, scenes.classes, Recipe(steps=1, batch=3, crop=(64, 96)), "panoptic")
    assert page.width > 2 * 96
    assert page.height >= 3 * 64
    pixels = np.asarray(page)
    assert len(np.unique(pixels[6:70, 6:102].reshape(-1, 3), axis=0)) > 20


def test_the_command_draws_a_picture(camvid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "preview", str(camvid), "--out", str(tmp_path / "seen.png"), "--crop", "32x64"]) == 0
    assert "camvid train, semantic" in capsys.readouterr().out
    with Image.open(tmp_path / "seen.png") as picture:
        assert picture.width > 128
