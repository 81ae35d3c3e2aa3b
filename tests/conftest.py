"""Fresh random numbers for every test, reproducible from the seed that a failure shows."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> int:
    """A new seed, or EMCA_TEST_SEED; torch starts from it, and pytest shows it with a failure."""
    chosen = int(os.environ.get("EMCA_TEST_SEED") or secrets.randbits(31))
    print(f"EMCA_TEST_SEED={chosen}")
    torch.manual_seed(chosen)
    return chosen


@pytest.fixture(autouse=True)
def _own_choice_of_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMCA_BACKEND", raising=False)


@pytest.fixture
def importable_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes of a test's own are found by the processes that it starts."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
