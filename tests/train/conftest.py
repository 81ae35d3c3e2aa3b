from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emca_bench.data import Sample, Scenes

RUNS = Path(__file__).parent / "runs.py"


@pytest.fixture(scope="session")
def scenes() -> list[Sample]:
    """A few generated images with truth."""
    return list(Scenes("train", size=(64, 64), count=6))


@pytest.fixture(scope="session")
def run() -> Callable[..., Any]:
    """`run` of runs.py."""
    return runpy.run_path(str(RUNS))["run"]


@pytest.fixture(scope="session")
def runs_file() -> Path:
    """The script that trains in a process of its own."""
    return RUNS
