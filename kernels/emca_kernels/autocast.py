"""Operators under `torch.autocast`: they take their tensors in its dtype, as torch's own matrix products do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CAST = (torch.float16, torch.bfloat16, torch.float32)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype of the autocast region that the tensor's device is in, or None outside of one."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def follow_autocast(*tensors: Tensor | None, widest: bool = False) -> tuple[Any, ...]:
    """The tensors in the dtype of the autocast region they are in; outside, in float64, and what is no tensor: as they are.

    Args:
        tensors: of one call, some of them None.
        widest: float32 instead, for operators that compute with positions.
    """
    first = next((tensor for tensor in tensors if isinstance(tensor, Tensor)), None)
    dtype = None if first is None else autocast_dtype(first)
    if dtype is None:
        return tensors
    to = torch.float32 if widest else dtype
    return tuple(tensor.to(to) if isinstance(tensor, Tensor) and tensor.dtype in CAST else tensor for tensor in tensors)
