"""The page on training: its commands name what there is, its blocks run, its numbers are those of the code and of the facts."""

from __future__ import annotations

import csv
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from emca_bench.cli import build_parser, main
from emca_bench.train.recipe import Recipe, make_recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text()
BASH = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).splitlines()


def test_the_python_example_runs():
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=300, capture_output=True, text=True)
    assert len(done.stdout.split(",")) == 4


def test_studies_of_the_commands_are_valid():
    named = re.findall(r"-s (?:accuracy|ablations) -- (\w+)", "\n".join(BASH)) + re.findall(r"emca-bench run (\w+)", "\n".join(BASH))
    assert {"ade20k", "cityscapes", "prototypes", "layers", "components", "mechanism"} <= set(named)
    for study in (*named, "ade20k_panoptic", "cityscapes_panoptic"):
        assert main(["validate", study]) == 0


def test_sessions_of_the_commands_are_there():
    named = set(re.findall(r"nox -s (\w+)", "\n".join(BASH)))
    assert named == {"accuracy", "ablations"}
    assert all(f"def {name}(session: nox.Session)" in (ROOT / "noxfile.py").read_text() for name in named)


def test_commands_are_those_of_the_command_line():
    lines = [line.replace("torchrun --nproc-per-node 8 -m emca_bench", "emca-bench") for line in BASH]
    calls = [re.sub(r"^\w+=\S+ ", "", line) for line in lines if "emca-bench" in line]
    assert len(calls) == 6
    for call in calls:
        build_parser().parse_args(shlex.split(call)[1:])


def test_recipes_are_those_of_the_code():
    short, published = (make_recipe(name, steps=100, batch=1, crop=(1, 1)) for name in ("short", "mask2former"))
    rows = {cells[1].strip(): cells[2:4] for line in PAGE.splitlines() if len(cells := line.split("|")) == 5}

    def shown(recipe: Recipe) -> dict[str, str]:
        return {
            "gradient norm at most": f"{recipe.clip_norm}",
            "points per mask": f"{recipe.points:,}",
            "precision": recipe.precision,
            "colour jitter (`color`)": recipe.color,
        }

    for column, recipe in enumerate((short, published)):
        for name, value in shown(recipe).items():
            assert rows[name][column].strip() == value
        rate, multiplier = rows["learning rate, backbone"][column].split(", x ")
        assert (float(rate), float(multiplier)) == (recipe.learning_rate, recipe.backbone_multiplier)
        low, high = re.findall(r"\d\.\d+", rows["scale jitter"][column])
        assert (float(low), float(high)) == recipe.scale


def test_expected_scores_are_those_of_the_tables():
    if not os.environ.get("EMCA_FACTS"):
        pytest.skip("EMCA_FACTS names no folder with the published numbers")
    with (Path(os.environ["EMCA_FACTS"]) / "published.csv").open() as file:
        facts = {(row["dataset"], row["task"], row["method"], row["backbone"]): row["value"] for row in csv.DictReader(file)}
    for data in ("ADE20K", "Cityscapes"):
        for task in ("semantic", "panoptic"):
            [row] = [line.split("|") for line in PAGE.splitlines() if line.startswith(f"| {data}, {task} |")]
            for column, method in ((3, "Mask2Former"), (4, "PEM")):
                assert row[column].split()[0] == facts[data, task, method, "R50"], (data, task, method)
