"""Augmented training batches, each a pure function of seed and step: they can begin at any step, in any process."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from emca_bench.data import Augmentation, Dataset, Sample
from emca_bench.data.targets import Targets, collate
from emca_bench.train.recipe import Recipe

Samples = Sequence[Sample] | Dataset
"""Images in memory, or a data set that reads them when they are asked for."""

PREFETCHED = 4
"""Batches that each loader process has ready at most."""


@dataclass(frozen=True, eq=False)
class Batch:
    """One process's part of a step.

    Attributes:
        images: float32 [B, 3, H, W] in 0..255.
        targets: B truths.
        seconds: what making it took.
    """

    images: Tensor
    targets: list[Targets]
    seconds: float


class Steps(TorchDataset[Batch]):
    """Batches by step, counted from 0. Every epoch is a new permutation; every slot has random numbers of its own.

    Args:
        samples: training images; read when they are asked for.
        recipe: seed, batch, crop and scale.
        task: "semantic" or "panoptic".
        rank, processes: which share of every batch this process takes.
    """

    def __init__(self, samples: Samples, recipe: Recipe, task: str, *, rank: int = 0, processes: int = 1) -> None:
        self.samples, self.recipe, self.task = samples, recipe, task
        share = recipe.batch // processes
        self._slots = range(rank * share, (rank + 1) * share)
        self._augment = Augmentation(recipe.crop, scale=recipe.scale, short_side=recipe.short_side)
        self._epoch: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, step: int) -> Batch:
        started = time.perf_counter()
        images, targets = collate([self._sample(step * self.recipe.batch + slot) for slot in self._slots], self.task)
        return Batch(images, targets, time.perf_counter() - started)

    def _sample(self, number: int) -> Sample:
        epoch, position = divmod(number, len(self.samples))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, np.random.default_rng([self.recipe.seed, epoch]).permutation(len(self.samples)))
        chosen = self.samples[int(self._epoch[1][position])]
        # three numbers, so that no slot shares a stream with an epoch's order
        return self._augment(chosen, np.random.default_rng([self.recipe.seed, epoch, position]))


def feed(steps: Steps, *, start: int, workers: int) -> Iterator[Batch]:
    """Batches from a step on, made in this process or ahead of time in `workers` others: the same either way."""
    if workers == 0:
        return (steps[step] for step in range(start, len(steps)))
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(start, len(steps)),
        num_workers=workers,
        prefetch_factor=PREFETCHED,
        # forking a process that has started threads of torch may hang it
        multiprocessing_context="forkserver",
    )
    return iter(loader)
