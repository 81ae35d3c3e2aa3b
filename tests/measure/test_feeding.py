"""Loader processes against training steps."""

from __future__ import annotations

import time

import numpy as np
import pytest

from emca_bench.cli import main
from emca_bench.data import Sample
from emca_bench.measure.feeding import Feeding, describe, loader_rate
from emca_bench.train import Recipe
from emca_bench.train.feed import Steps


def feeding(loaders: dict[int, float]) -> Feeding:
    """Steps of 0.2 s with 8 images: 40 a second."""
    return Feeding(Recipe(steps=1000, batch=8, crop=(64, 96)), 0.2, loaders)


def test_what_is_needed_and_who_keeps_up():
    found = feeding({0: 120.0, 1: 20.0, 2: 39.5, 4: 75.0})
    assert found.needed == pytest.approx(40.0)
    # between steps: a batch takes a third of the time of a step, a quarter of both together
    assert [found.waiting(count) for count in found.loaders] == pytest.approx([0.25, 0.5, 0.0125, 0.0])
    assert found.enough == 2
    lines = describe(found, "emca", own=1)
    assert lines[0] == "emca, batch 8 of 64x96: a step takes 200 ms and needs 40.0 images/s"
    assert lines[3].split() == ["1", "20.0", "50%"]
    assert lines[-2:] == ["loader_workers = 2 keeps up", "the study has 1: steps wait 50% of the time, and its 1000 steps take 6:40"]
    assert describe(feeding({1: 10.0}), "emca", own=1)[-2] == "with none of these do the images keep up"


class Slow:
    """An image takes a tenth of a second, in whatever process."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> Sample:
        time.sleep(0.1)
        return Sample(str(index), np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8))


@pytest.mark.usefixtures("importable_tests")
def test_a_loader_is_as_fast_as_its_processes_and_not_as_its_stock():
    """Batches that were made before anybody looked would show a rate beyond what the processes make."""
    steps = Steps(Slow(), Recipe(steps=10_000, batch=1, crop=(32, 32)), "semantic")
    alone, two = (loader_rate(steps, count, 1.0) for count in (0, 2))
    assert 3 < alone < 10
    assert 1.3 * alone < two < 24


def test_the_command_tells_of_the_first_cell(tiny_training, capsys: pytest.CaptureFixture[str]):
    """Generated images take longer than the steps of the tiny model, and between steps at that: a check that does not hold."""
    study = tiny_training("none", "emca", steps=4, train_images=4, seed=0)
    code = main(["feed", str(study), "--processes", "0", "--seconds", "0.1"])
    printed = capsys.readouterr().out
    assert "none scope=end_to_end" in printed
    assert "batch 2 of 64x64: a step takes" in printed
    assert "the study has 0: steps wait" in printed
    assert "and its 4 steps take 0:0" in printed
    assert code == 1
