from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SMALL = """
[study]
name = "small"
title = "Small"
question = "Does the suite work?"
measures = ["macs", "latency", "memory"]
baselines = ["masked"]

[settings]
rounds = 4
min_seconds = 0.0
min_samples = 2
max_samples = 2

[fixed]
scope = "attention"
batch = 1
queries = 10
width = 32
allowed = 0.5

[axes]
arm = ["masked", "emca"]
pixels = ["4x4", "8x8"]
"""

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def small_study(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """`emca-bench` in a process of its own, started in an empty folder."""

    def call(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "emca_bench", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, **environment},
            timeout=300,
            check=False,
        )

    return call
