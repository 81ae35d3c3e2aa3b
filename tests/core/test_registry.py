from __future__ import annotations

import pytest

from emca_bench.errors import UsageError
from emca_bench.registry import Registry


def test_unknown_name_lists_what_exists_and_suggests_the_near_one():
    registry: Registry[int] = Registry("fruit")
    registry.register("apple")(1)
    registry.register("pear")(2)
    with pytest.raises(UsageError, match=r"unknown fruit 'appel' \(did you mean 'apple'\?\); known: apple, pear"):
        registry["appel"]


def test_the_same_name_twice_is_refused():
    registry: Registry[int] = Registry("fruit")
    registry.register("apple")(1)
    with pytest.raises(ValueError, match="twice"):
        registry.register("apple")(2)
    assert registry["apple"] == 1
