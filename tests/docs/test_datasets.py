"""The page on data sets: every name, and its blocks as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emca_bench.cli import main
from emca_bench.data import DATASETS, open_dataset

PAGE = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text()


def block(language: str) -> str:
    [found] = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


def test_every_data_set_is_named():
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == set(DATASETS)


def test_the_study_is_valid(tmp_path: Path):
    study = tmp_path / "mine.toml"
    study.write_text(block("toml"))
    assert main(["validate", str(study)]) == 0


def test_the_annotations_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "mine"
    (folder / "images" / "val").mkdir(parents=True)
    (folder / "panoptic_val").mkdir()
    (folder / "panoptic_val.json").write_text(block("json"))
    Image.new("RGB", (384, 384)).save(folder / "images" / "val" / "front.jpg")
    ids = np.zeros((384, 384, 3), np.uint8)
    ids[:100, :, 0], ids[100:, :, 0] = 2, 1
    Image.fromarray(ids).save(folder / "panoptic_val" / "front.png")
    monkeypatch.setenv("EMCA_DATASETS", str(tmp_path))
    assert [segment.category for segment in open_dataset("mine", "val")[0].segments] == [1, 0]


def test_the_python_example_runs():
    subprocess.run([sys.executable, "-c", block("python")], check=True, timeout=300)


def test_the_nox_commands_name_studies(capsys: pytest.CaptureFixture[str]):
    for study in re.findall(r"-s accuracy -- (\w+)", PAGE):
        assert main(["validate", study]) == 0
    assert "cells" in capsys.readouterr().out
