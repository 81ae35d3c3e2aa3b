"""Loads the native library, and says which calls it can serve."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from emca_kernels.build import load_failure
from emca_kernels.native.recipe import NATIVE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def unavailable() -> str | None:
    """Why the library is not there, or None; builds and loads it at the first call."""
    return load_failure(NATIVE)


def instruction_set() -> str:
    """ "avx512bf16", "avx512", "avx2" or "base": what the kernels run on here."""
    return torch.ops.emca_native.instruction_set()


def refuses(features: Tensor, *_: Tensor | None) -> str | None:
    """The reason why the native backend cannot serve tensors like these, or None."""
    if features.device.type != "cpu":
        return f"{features.device.type} tensors"
    if features.dtype not in DTYPES:
        return f"{features.dtype}".removeprefix("torch.")
    if features.numel() == 0:
        return "empty tensors"
    return unavailable()
