"""Tests of the Triton kernels, in processes of their own: a process either interprets kernels or compiles them."""

from __future__ import annotations

import os
import secrets

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> int:
    """A new seed, or EMCA_TEST_SEED; torch starts from it, and pytest shows it with a failure."""
    chosen = int(os.environ.get("EMCA_TEST_SEED") or secrets.randbits(31))
    print(f"EMCA_TEST_SEED={chosen}")
    torch.manual_seed(chosen)
    return chosen
