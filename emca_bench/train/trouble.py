"""What goes wrong in training, said with the step, the arm and what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from emca_bench.models.matcher import DivergedError
from emca_bench.train.recipe import Recipe

CPU_ALLOCATOR = "DefaultCPUAllocator"
"""What torch's message names when memory of the host runs out."""


class OutOfMemoryError(RuntimeError):
    """A training step does not fit into the memory of the device."""


@contextmanager
def explained(label: str, step: int, recipe: Recipe) -> Iterator[None]:
    """Turn what torch says about a step, counted from 1, into what its user can do about it.

    Raises:
        DivergedError, OutOfMemoryError: naming arm, step and what to lower.
    """
    try:
        yield
    except DivergedError as error:
        what = str(error).split(":")[0]
        raise DivergedError(f"{label}: {what} at step {step} of {recipe.steps}: training has diverged; {_gentler(recipe)}") from error
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and CPU_ALLOCATOR not in str(error):
            raise
        raise OutOfMemoryError(f"{label}: out of memory at step {step} with {_size(recipe)}; {_smaller(recipe)}") from error


def _gentler(recipe: Recipe) -> str:
    rate = recipe.learning_rate
    wider = "" if recipe.precision == "float32" else ', or set precision = "float32"'
    return f"try a smaller learning rate than {rate:g}, for example {rate / 5:g}, or a longer warmup than {recipe.warmup:g}{wider}"


def _size(recipe: Recipe) -> str:
    return f"batch = {recipe.batch} at {recipe.crop[0]}x{recipe.crop[1]} in {recipe.precision}"


def _smaller(recipe: Recipe) -> str:
    if recipe.batch > 1:
        return f"try batch = {recipe.batch // 2}"
    narrower = "" if recipe.precision == "bfloat16" else ', or precision = "bfloat16"'
    return f"one image does not fit: try a smaller image_size{narrower}"
