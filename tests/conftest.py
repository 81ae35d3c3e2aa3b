"""Fresh random numbers for every test, reproducible from the seed that a failure shows."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from emca_bench.data import IGNORE, VOID, Sample


@pytest.fixture(autouse=True)
def seed() -> int:
    """A new seed, or EMCA_TEST_SEED; torch starts from it, and pytest shows it with a failure."""
    chosen = int(os.environ.get("EMCA_TEST_SEED") or secrets.randbits(31))
    print(f"EMCA_TEST_SEED={chosen}")
    torch.manual_seed(chosen)
    return chosen


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """Numpy's numbers from the same seed."""
    return np.random.default_rng(seed)


@pytest.fixture(autouse=True)
def _own_choice_of_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMCA_BACKEND", raising=False)


@pytest.fixture
def importable_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes of a test's own are found by the processes that it starts."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])


@pytest.fixture
def own_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Path]]:
    """Lists the living processes that were started since, below /proc: their environment has this test's mark."""
    mark = f"EMCA_TEST_MARK={tmp_path}"
    monkeypatch.setenv(*mark.split("="))

    def environment_of(path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError:
            return b""

    # that of this process is as it was when it started
    return lambda: [path for path in Path("/proc").glob("[0-9]*/environ") if mark.encode() in environment_of(path)]


@pytest.fixture
def unlabelled() -> Callable[[Sample], Sample]:
    """An image whose every pixel is void."""

    def without_labels(sample: Sample) -> Sample:
        assert sample.panoptic is not None
        return Sample(sample.name, sample.image, np.full_like(sample.semantic, IGNORE), np.full_like(sample.panoptic, VOID))

    return without_labels


@pytest.fixture
def tiny_training(tmp_path: Path) -> Callable[..., Path]:
    """Writes a study that trains the tiny model on generated scenes in seconds; parameters are laid over the usual ones."""

    def write(*arms: str, axes: dict[str, list[int]] | None = None, measures: tuple[str, ...] = ("accuracy",), **fixed: object) -> Path:
        head = {"name": "tiny", "title": "Tiny", "question": "?", "measures": list(measures)}
        usual = {"scope": "end_to_end", "model": "mask2former_tiny", "dataset": "scenes", "image_size": "64x64", "batch": 2, "points": 64}
        tables = {"study": head, "fixed": {**usual, **fixed}, "axes": {"arm": list(arms), **(axes or {})}}
        lines = [
            line
            for name, table in tables.items()
            for line in (f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items()))
        ]
        path = tmp_path / "tiny.toml"
        path.write_text("\n".join(lines) + "\n")
        return path

    return write
