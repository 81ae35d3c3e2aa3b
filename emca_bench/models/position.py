"""Sine position embedding of pixel maps."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def sine_position(shape: tuple[int, int], width: int, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Position embedding [h * w, C] of a map, row by row: the first half of the channels for y, the second for x.

    Positions count from 1 and are scaled to 2 pi over the map; sines and cosines alternate.

    Source: DETR's normalised sine embedding, as Mask2Former uses it (temperature 10000).

    Args:
        shape: (h, w).
        width: C, a multiple of 4.
        device, dtype: of the result; computed in float32 at least.
    """
    if width % 4:
        raise ValueError(f"width={width} of a sine position embedding must be a multiple of 4")
    half = width // 2
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    period = 10000.0 ** (2 * torch.div(torch.arange(half, device=device), 2, rounding_mode="floor").to(exact) / half)

    def encode(size: int) -> Tensor:
        position = torch.arange(1, size + 1, device=device, dtype=exact) / (size + 1e-6) * (2 * math.pi)
        angle = position[:, None] / period
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=2).flatten(1)

    height, columns = shape
    rows = encode(height)[:, None].expand(height, columns, half)
    across = encode(columns)[None].expand(height, columns, half)
    return torch.cat([rows, across], dim=-1).flatten(0, 1).to(dtype)


def sine_position_like(shape: tuple[int, int], like: Tensor) -> Tensor:
    """`sine_position` of the width, device and dtype of tokens [..., C], kept for the sizes that were asked for last.

    Do not write to it. Tensors are kept for eager calls on real tensors alone: a compiler, an exporter or a fake tensor gets its own.
    """
    make = sine_position if torch.compiler.is_compiling() or type(like) is not Tensor or like.is_meta else _kept
    return make(shape, like.shape[-1], device=like.device, dtype=like.dtype)


# three levels of three sizes: 43 MiB a size in float32 at images of 1024x2048 and 256 channels
@lru_cache(maxsize=9)
def _kept(shape: tuple[int, int], width: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    # a tensor of inference mode could not serve a training step later
    with torch.inference_mode(False), torch.no_grad():
        return sine_position(shape, width, device=device, dtype=dtype)
