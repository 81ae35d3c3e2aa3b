"""Random integers that are the same on every machine and under every NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")


class Dice:
    """Draws integers from a PCG64 stream.

    NumPy fixes the raw output of its bit generators for ever, but not what `Generator.integers` makes of it: hence the raw output.

    Args:
        entropy: non-negative integers; other integers give an independent stream.
    """

    def __init__(self, *entropy: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(entropy))

    def between(self, low: int, high: int) -> int:
        """A uniform integer, both ends included."""
        return low + int(self._bits.random_raw()) % (high - low + 1)

    def chance(self, percent: int) -> bool:
        """True in `percent` of 100 draws."""
        return self.between(0, 99) < percent

    def pick(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.between(0, len(options) - 1)]

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different options in random order."""
        left = list(options)
        return [left.pop(self.between(0, len(left) - 1)) for _ in range(count)]

    def bytes(self, *shape: int) -> npt.NDArray[np.uint8]:
        """Uniform uint8 of the given shape."""
        count = int(np.prod(shape))
        words = np.asarray(self._bits.random_raw(-(-count // 8)), dtype="<u8")
        return words.view(np.uint8)[:count].reshape(shape)
