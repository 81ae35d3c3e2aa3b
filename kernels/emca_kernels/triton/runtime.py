"""Where Triton kernels can run, and how one is launched."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ARCHITECTURES = {(8, 0): 80, (9, 0): 90}
"""Compute capability -> column of the table of tile sizes."""


@dataclass(frozen=True)
class Launch:
    """One kernel with everything that its call needs."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any] = field(repr=False)
    """Parameter name -> tensor, number, named tuple of these, or what a constexpr parameter is given."""
    num_warps: int
    num_stages: int

    def run(self, device: torch.device) -> None:
        """Enqueue it on the current stream of the device."""
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid](**self.arguments, num_warps=self.num_warps, num_stages=self.num_stages, enable_fp_fusion=True)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors. Decided when the kernels are imported, so for a whole process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def missing() -> str | None:
    """Why kernels can run nowhere in this process, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not interpreting() and not torch.cuda.is_available():
        return "no CUDA device"
    return None


@functools.cache
def architecture(device: torch.device) -> int:
    """80 or 90: whose tile sizes a device uses; 0 if there are none for it."""
    return 90 if device.type != "cuda" else ARCHITECTURES.get(torch.cuda.get_device_capability(device), 0)


def refuses(features: Tensor, *others: Tensor | None) -> str | None:
    """The reason why Triton kernels cannot serve tensors like these, or None."""
    reason = missing()
    if reason is not None:
        return reason
    expected = "cpu" if interpreting() else "cuda"
    if features.device.type != expected:
        return f"{features.device.type} tensors" + (" in Triton's interpreter" if interpreting() else "")
    if features.dtype not in DTYPES:
        return f"{features.dtype}".removeprefix("torch.")
    if any(tensor is not None and tensor.numel() == 0 for tensor in (features, *others)):
        return "empty tensors"
    if not architecture(features.device):
        return f"no tile sizes for {torch.cuda.get_device_name(features.device)}"
    return None


def refuses_unasked(*_: Tensor | None) -> str | None:
    """The interpreter is for checking, never for serving."""
    return "interpreted kernels serve when asked for" if interpreting() else None


def lazily(module: str, name: str) -> Callable[..., Any]:
    """A function that imports its module, and so triton, at the first call."""

    @functools.cache
    def load() -> Callable[..., Any]:
        return getattr(importlib.import_module(module), name)

    def call(*arguments: Any, **options: Any) -> Any:
        return load()(*arguments, **options)

    return call
