"""Seeded weights and inputs of what is measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ImpossibleError(Exception):
    """This cell cannot be measured here, and that is the answer: no such device, no such library, more prototypes than pixels."""


@dataclass
class Maker:
    """Makes weights and inputs, seeded, of one dtype on one device."""

    dtype: torch.dtype
    device: str
    seed: int

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        if self.device == "meta":
            return torch.empty(shape, dtype=self.dtype, device="meta")
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def mask(self, *shape: int, share: float) -> Tensor:
        """Bools of which a share is true."""
        if self.device == "meta":
            return torch.empty(shape, dtype=torch.bool, device="meta")
        return (torch.rand(shape, generator=self.generator) < share).to(self.device)

    def place(self, module: nn.Module) -> nn.Module:
        """The module as it is measured: in evaluation mode, without gradients."""
        return module.to(self.device, self.dtype).eval().requires_grad_(False)
