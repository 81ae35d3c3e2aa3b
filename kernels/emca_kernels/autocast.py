"""Operators under `torch.autocast`: they take their tensors in its dtype, as torch's own matrix products do."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype of the autocast region that the tensor's device is in, or None outside of one."""
    device = tensor.device.type
    # of devices without autocast torch raises instead of saying no
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def follow_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of the autocast region they are in; outside, and in float64, as they are."""
    dtype = autocast_dtype(tensors[0])
    if dtype is None:
        return tensors
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)
