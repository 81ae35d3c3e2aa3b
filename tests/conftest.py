"""Fixtures that all tests share."""

from __future__ import annotations

import secrets

import pytest


@pytest.fixture
def seed(record_property: pytest.RecordProperty) -> int:
    """A fresh seed for every test; pytest prints it when the test fails."""
    value = secrets.randbits(32)
    print(f"seed {value}")
    record_property("seed", value)
    return value
