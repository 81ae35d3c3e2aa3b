"""Dice: uniform, independent of NumPy's distributions, both ends included."""

from __future__ import annotations

import numpy as np

from emca_bench.data.dice import Dice


def test_equal_entropy_gives_equal_draws_and_other_entropy_others() -> None:
    draws = [[dice.between(0, 10**6) for _ in range(20)] for dice in (Dice(1, 2), Dice(1, 2), Dice(1, 3))]
    assert draws[0] == draws[1] != draws[2]


def test_between_reaches_both_ends_evenly() -> None:
    dice = Dice(5)
    counts = np.bincount([dice.between(-2, 2) + 2 for _ in range(5000)], minlength=5)
    assert len(counts) == 5
    assert (abs(counts - 1000) < 150).all()


def test_sample_draws_without_replacement_in_any_order() -> None:
    dice = Dice(6)
    drawn = [tuple(dice.sample("abc", 2)) for _ in range(200)]
    assert set(drawn) == {(a, b) for a in "abc" for b in "abc" if a != b}


def test_bytes_are_uniform_and_of_any_shape() -> None:
    noise = Dice(7).bytes(3, 101, 67)
    assert (noise.shape, noise.dtype) == ((3, 101, 67), np.uint8)
    assert abs(noise.mean() - 127.5) < 2
    assert len(np.unique(noise)) == 256
