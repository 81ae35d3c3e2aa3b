"""Augmented training batches, each a pure function of seed and step: they can begin at any step, in any process."""

from __future__ import annotations

import atexit
import os
import pickle
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from emca_bench.data import Dataset, Sample
from emca_bench.data.targets import Targets, collate
from emca_bench.errors import UsageError
from emca_bench.train.recipe import Recipe

Samples = Sequence[Sample] | Dataset
"""Images in memory, or a data set that reads them when they are asked for."""

PREFETCHED = 4
"""Batches that each loader process has ready at most."""

EXPECTED_OF_A_CLASS = "expected a class of a module that can be imported, or loader_workers = 0"


@dataclass(frozen=True, eq=False)
class Batch:
    """One process's part of a step, packed: four tensors whatever it holds, since each that a loader process hands over takes a file.

    Attributes:
        images: uint8 [B, 3, H, W].
        owners: int16 [B, H, W], the number of the target that a pixel belongs to, from 1, 0 for none.
        valid: bool [B, H, W], see `Targets`.
        labels: int64 [N], of all targets, image by image.
        counts: targets of each image, N together.
        seconds: what making it took.
    """

    images: Tensor
    owners: Tensor
    valid: Tensor
    labels: Tensor
    counts: tuple[int, ...]
    seconds: float

    def on(self, device: torch.device | str) -> tuple[Tensor, list[Targets]]:
        """Images, float32 channels-last in 0..255, and targets on a device."""
        images = self.images.to(device, non_blocking=True).float().contiguous(memory_format=torch.channels_last)
        owners, valid = self.owners.to(device, non_blocking=True), self.valid.to(device, non_blocking=True)
        targets = []
        for labels_T, owner_HW, valid_HW in zip(self.labels.to(device).split(self.counts), owners, valid, strict=True):
            numbers_T = torch.arange(1, len(labels_T) + 1, device=owner_HW.device)
            targets.append(Targets(labels_T, owner_HW == numbers_T[:, None, None], valid_HW))
        return images, targets


def pack(images: Tensor, targets: Sequence[Targets], seconds: float) -> Batch:
    """A collated batch, whose images hold whole numbers and whose masks are disjoint."""
    owners = torch.zeros(len(targets), *images.shape[-2:], dtype=torch.int16)
    for owner_HW, target in zip(owners, targets, strict=True):
        for number, mask_HW in enumerate(target.masks, start=1):
            owner_HW[mask_HW] = number
    counts = tuple(len(target.labels) for target in targets)
    valid, labels = torch.stack([target.valid for target in targets]), torch.cat([target.labels for target in targets])
    return Batch(images.byte(), owners, valid, labels, counts, seconds)


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
        self._augment = recipe.augmentation()
        self._epoch: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, step: int) -> Batch:
        started = time.perf_counter()
        images, targets = collate([self._sample(step * self.recipe.batch + slot) for slot in self._slots], self.task)
        packed = pack(images, targets, 0.0)
        return replace(packed, seconds=time.perf_counter() - started)

    def _sample(self, number: int) -> Sample:
        epoch, position = divmod(number, len(self.samples))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, np.random.default_rng([self.recipe.seed, epoch]).permutation(len(self.samples)))
        chosen = self.samples[int(self._epoch[1][position])]
        # three numbers, so that no slot shares a stream with an epoch's order
        return self._augment(chosen, np.random.default_rng([self.recipe.seed, epoch, position]))


class _Told(TorchDataset[Batch | UsageError]):
    """Steps of a file for loader processes: what is wrong is handed over, since torch wraps what is raised in a traceback.

    The file keeps small what starts a process: of one that cannot read all of it, Python would wait for ever.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self._steps: Steps | None = None

    def __getitem__(self, step: int) -> Batch | UsageError:
        try:
            if self._steps is None:
                self._steps = _unpickled(self.file)
            return self._steps[step]
        except UsageError as error:
            return error


def _pickled(steps: Steps) -> bytes:
    try:
        return pickle.dumps(steps)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UsageError(f"loader processes cannot be handed the data set ({error}); {EXPECTED_OF_A_CLASS}") from error


def _unpickled(file: str) -> Steps:
    try:
        steps: Steps = pickle.loads(Path(file).read_bytes())
    except (ImportError, AttributeError) as error:
        raise UsageError(f"a loader process cannot import the data set's class ({error}); {EXPECTED_OF_A_CLASS}") from error
    return steps


def _leave_at_once(worker: int) -> None:
    """Have a loader process end without Python's clean-up, which stops the thread that hands batches over: inside torch, that aborts."""
    atexit.register(os._exit, 0)


def feed(steps: Steps, *, start: int, workers: int) -> Iterator[Batch]:
    """Batches from a step on, made in this process or ahead of time in `workers` others: the same either way.

    Raises:
        UsageError: an image that cannot be used, when its batch is due; a data set that other processes cannot have.
    """
    if workers == 0:
        yield from (steps[step] for step in range(start, len(steps)))
        return
    with tempfile.NamedTemporaryFile(prefix="emca-bench-") as file:
        file.write(_pickled(steps))
        file.flush()
        loader = DataLoader(
            _Told(file.name),
            batch_size=None,
            sampler=range(start, len(steps)),
            num_workers=workers,
            prefetch_factor=PREFETCHED,
            # a fork of a process with threads of torch may hang; a child of a fork server would outlive a parent that is killed
            multiprocessing_context="spawn",
            worker_init_fn=_leave_at_once,
        )
        batches = iter(loader)
        try:
            for batch in batches:
                if isinstance(batch, UsageError):
                    raise batch
                yield batch
        finally:
            # its processes end before their file does
            del batches
