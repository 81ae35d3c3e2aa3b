"""Inputs with poison around them and outputs with poison inside, on the CPU in Triton's interpreter, else on a CUDA device.

The interpreter notices no read beyond a tensor's end: what lies there must spoil a result that depends on it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from emca_kernels.masks import BoolMask, EmbeddingMask, LogitMask, Mask, PackedMask
from emca_kernels.triton.runtime import interpreting
from torch import Tensor

PIXELS, QUERIES = (1, 7, 100, 255), (1, 15, 37, 100, 130)


@pytest.fixture
def device() -> torch.device:
    if interpreting():
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.skip("no CUDA device; TRITON_INTERPRET=1 runs these tests on the CPU")


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel forgets to write is NaN, or a key above all others."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self: Tensor, *arguments: Any, **options: Any) -> Tensor:
        made = new_empty(self, *arguments, **options)
        if made.device.type == "meta":
            return made
        return made.fill_(torch.nan if made.is_floating_point() else torch.iinfo(made.dtype).max)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@dataclass
class Inputs:
    """One call."""

    features: Tensor
    queries: Tensor
    mask: Mask | None
    position: Tensor | None
    heads: int

    @property
    def allowed(self) -> Tensor | None:
        return None if self.mask is None else self.mask.allowed()

    @property
    def located(self) -> Tensor:
        """Features with their position, rounded to their dtype."""
        return self.features if self.position is None else self.features + self.position


@dataclass
class Maker:
    """Draws inputs; sizes that are not asked for are drawn too."""

    device: torch.device
    draw: random.Random

    def __call__(
        self,
        dtype: torch.dtype,
        mask: str,
        *,
        pixels: int | None = None,
        queries: int | None = None,
        width: int | None = None,
        heads: int = 1,
        integers: bool = True,
        position: bool | None = None,
    ) -> Inputs:
        batch = self.draw.choice((1, 2))
        pixels = pixels or self.draw.choice(PIXELS)
        queries = queries or self.draw.choice(QUERIES)
        channels = heads * (width or self.draw.choice((3, 8, 24, 80) if heads > 1 else (8, 48, 80, 272)))
        located = self.draw.random() < 0.5 if position is None else position
        print(f"B={batch} P={pixels} Q={queries} C={channels} M={heads} {dtype} mask={mask} position={located}")

        def numbers(*shape: int) -> Tensor:
            drawn = torch.randint(-2, 3, shape) if integers else torch.randn(shape)
            return drawn.to(dtype)

        return Inputs(
            self.lay_out(numbers(batch, pixels, channels)),
            self.lay_out(numbers(batch, queries, channels)),
            self.mask(mask, numbers, batch, queries, pixels),
            self.lay_out(numbers(1, pixels, channels)).expand(batch, -1, -1) if located else None,
            heads,
        )

    def mask(self, kind: str, numbers: Callable[..., Tensor], batch: int, queries: int, pixels: int) -> Mask | None:
        """Some queries may look nowhere, some everywhere."""
        allowed = torch.rand(batch, queries, pixels) < self.draw.choice((0.02, 0.3))
        allowed[:, 1::4] = False
        allowed[:, 3::4] = True
        match kind:
            case "bool":
                return BoolMask(self.poisoned(allowed, True))
            case "packed":
                return PackedMask(self.poisoned(PackedMask.pack(allowed).words_BQW, -1), pixels)
            case "logit":
                size = torch.randint(0, 3, allowed.shape).to(numbers(1).dtype)
                return LogitMask(self.poisoned(torch.where(allowed, size, -1 - size), torch.inf))
            case "embedding":
                width = self.draw.choice((5, 24, 264))
                embedding, features = numbers(batch, queries, width), numbers(batch, pixels, width)
                embedding[:, 1::4, :1], embedding[:, 1::4, 1:], features[..., :1] = -1, 0, 1
                embedding[:, 3::4] = 0
                return EmbeddingMask(self.lay_out(embedding), self.lay_out(features))
        return None

    def lay_out(self, tensor: Tensor) -> Tensor:
        """The same numbers, poison around them, rows or columns contiguous or neither."""
        poison = self.draw.choice((torch.nan, 3e4, -3e4))
        if self.draw.random() < 0.3:
            return self.poisoned(tensor.mT, poison).mT
        laid = self.poisoned(tensor, poison)
        return self.poisoned(torch.stack((laid.cpu(), laid.cpu()), -1).flatten(-2), poison)[..., ::2] if self.draw.random() < 0.2 else laid

    def poisoned(self, tensor: Tensor, poison: float) -> Tensor:
        """A view into a larger tensor that is poison everywhere else."""
        around = tensor.new_full([size + 6 for size in tensor.shape], poison, device=self.device)
        view = around[tuple(slice(3, 3 + size) for size in tensor.shape)]
        return view.copy_(tensor)


@pytest.fixture
def make(device: torch.device, seed: int) -> Maker:
    return Maker(device, random.Random(seed))
