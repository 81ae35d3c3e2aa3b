"""Whether loader processes keep up with the training steps of a cell: images a second of both, on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from emca_bench.data import open_dataset
from emca_bench.measure.training import built_model, first_samples, recipe_of
from emca_bench.models.criterion import Criterion
from emca_bench.progress import clock
from emca_bench.specs import Arm
from emca_bench.train import Processes, Recipe
from emca_bench.train.feed import PREFETCHED, Steps, feed
from emca_bench.train.loop import Trainer

WARM_STEPS, TIMED_STEPS = 3, 10
"""The first steps choose algorithms and grow pools of memory."""

ENDLESS = 2**31
"""Steps."""

TOLERATED = 0.02
"""Share of the time that steps may wait before data count as too slow."""

OnLoader = Callable[[int], None]


@dataclass(frozen=True)
class Feeding:
    """What was measured.

    Attributes:
        recipe: of the cell.
        step_seconds: median time of a step whose batch is at hand.
        loaders: images a second by number of loader processes; from the disk or from the system's cache, as the files happen to be.
    """

    recipe: Recipe
    step_seconds: float
    loaders: Mapping[int, float]

    @property
    def needed(self) -> float:
        """Images a second that steps take."""
        return self.recipe.batch / self.step_seconds

    def waiting(self, processes: int) -> float:
        """Share of the time that steps wait for images with a number of loader processes; with 0, batches are made between steps."""
        rate = self.loaders[processes]
        return max(0.0, 1 - rate / self.needed) if processes else self.needed / (self.needed + rate)

    def seconds(self, processes: int) -> float:
        """What all steps of the training take with a number of loader processes."""
        return self.recipe.steps * self.step_seconds / (1 - self.waiting(processes))

    @property
    def enough(self) -> int | None:
        """The fewest loader processes for which steps do not wait; None where no number of them does."""
        return min((count for count in self.loaders if self.waiting(count) <= TOLERATED), default=None)


def measure_feeding(
    arm: Arm, params: Mapping[str, Any], *, processes: Sequence[int], seconds: float, on_loader: OnLoader = lambda count: None
) -> Feeding:
    """Time the steps of a cell, then its loader with each number of processes; nothing is trained that lasts.

    Args:
        arm: whose steps are timed.
        params: the cell's parameters.
        processes: numbers of loader processes.
        seconds: for which a loader is watched once it is under way; it makes a batch a process at least.
        on_loader: called before each number of processes.

    Raises:
        UsageError: see `recipe_of` and the data set.
    """
    recipe = recipe_of(params)
    task = str(params.get("task", "semantic"))
    samples = first_samples(open_dataset(str(params["dataset"]), "train"), int(params.get("train_images", 0)))
    steps = Steps(samples, replace(recipe, steps=ENDLESS), task)
    step = step_seconds(arm, params, steps, recipe)
    rates = {}
    for count in processes:
        on_loader(count)
        rates[count] = loader_rate(steps, count, seconds)
    return Feeding(recipe, step, rates)


def step_seconds(arm: Arm, params: Mapping[str, Any], steps: Steps, recipe: Recipe) -> float:
    """Median time of a training step, of batches that are there already."""
    processes = Processes(str(params.get("device", "cpu")))
    classes = len(open_dataset(str(params["dataset"]), "train").classes)
    model, _ = built_model(arm, params, classes=classes, device=processes.device)
    criterion = Criterion(classes=classes, points=recipe.points)
    trainer = Trainer(model, recipe, criterion, processes, pretrained_backbone=model.backbone.pretrained)
    batches = [steps[number] for number in range(2)]
    times = []
    for number in range(WARM_STEPS + TIMED_STEPS):
        started = time.perf_counter()
        # a step reads its loss, and so it has ended on the device too
        trainer.do(batches[number % len(batches)])
        times.append(time.perf_counter() - started)
    return median(times[WARM_STEPS:])


def loader_rate(steps: Steps, processes: int, seconds: float) -> float:
    """Images a second of the loader when nobody makes it wait, 0 processes being this one."""
    batches = feed(steps, start=0, workers=processes)
    # what was made while processes started is no measure of what they make
    for _ in range(1 + processes * PREFETCHED):
        next(batches)
    started, made = time.perf_counter(), 0
    while made < max(1, processes) or time.perf_counter() - started < seconds:
        next(batches)
        made += 1
    return made * steps.recipe.batch / (time.perf_counter() - started)


def describe(feeding: Feeding, label: str, *, own: int) -> list[str]:
    """The lines that `emca-bench feed` prints; `own` is the number of loader processes that the study has."""
    recipe = feeding.recipe
    size = f"batch {recipe.batch} of {recipe.crop[0]}x{recipe.crop[1]}"
    lines = [f"{label}, {size}: a step takes {1e3 * feeding.step_seconds:.0f} ms and needs {feeding.needed:.1f} images/s"]
    lines.append(f"{'loader processes':>18} {'images/s':>10} {'steps wait':>12}")
    lines += [f"{count:18d} {rate:10.1f} {feeding.waiting(count):12.0%}" for count, rate in feeding.loaders.items()]
    enough = feeding.enough
    lines.append("with none of these do the images keep up" if enough is None else f"loader_workers = {enough} keeps up")
    waits, whole = feeding.waiting(own), clock(feeding.seconds(own))
    return [*lines, f"the study has {own}: steps wait {waits:.0%} of the time, and its {recipe.steps} steps take {whole}"]
