"""How the fast backends reach values: by 32-bit offsets from the start of an image."""

from __future__ import annotations

from torch import Tensor

OFFSETS = 2**31


def too_many(value: Tensor) -> str | None:
    """Why 32-bit offsets do not reach all values, or None."""
    return f"{value.numel()} values, 2^31 or more" if value.numel() >= OFFSETS else None


def reachable(value_BPMd: Tensor) -> Tensor:
    """The values with channels next to each other; pixels and heads stay where they are if offsets reach them."""
    close = value_BPMd.stride(3) == 1 and value_BPMd.shape[1] * value_BPMd.stride(1) < OFFSETS
    return value_BPMd if close else value_BPMd.contiguous()
