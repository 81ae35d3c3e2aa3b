"""Calls of deformable attention as the pixel decoder of Mask2Former makes them: every pixel of three levels is a query."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from emca_kernels import deformable_attention, deformable_attention_from_offsets
from emca_kernels.specs import DEFORMABLE_ATTENTION, DEFORMABLE_ATTENTION_FROM_OFFSETS, Sizes
from torch import Tensor

from emca_bench.errors import UsageError
from emca_bench.measure.inputs import ImpossibleError, Maker
from emca_bench.models.pixel_decoders.msdeform import pixel_centres
from emca_bench.specs import parse_size

HEADS, POINTS = 8, 4
SPREAD = 3.0
"""Standard deviation of the offsets, in pixels: trained ones reach as far."""
RIVAL = "torch_ms_deform_attn"


def levels_of(pixels: str) -> list[tuple[int, int]]:
    """(h, w) at strides 32, 16 and 8, from that at stride 8."""
    height, width = parse_size(pixels, what="parameter 'pixels'")
    if height % 4 or width % 4:
        raise UsageError(
            f"parameter 'pixels' is {pixels!r}: the finest level of deformable attention must be whole at a quarter of its size"
        )
    return [(height // part, width // part) for part in (4, 2, 1)]


def deformable_sizes(params: Mapping[str, Any], itemsize: int) -> Sizes:
    """What `OpSpec` takes."""
    shapes = levels_of(str(params["pixels"]))
    pixels, width = sum(rows * columns for rows, columns in shapes), int(params["width"])
    if width % HEADS:
        raise UsageError(f"parameter 'width' is {width}, expected a multiple of the {HEADS} heads of deformable attention")
    return Sizes(
        batch=int(params["batch"]),
        pixels=pixels,
        queries=pixels,
        width=width,
        itemsize=itemsize,
        heads=HEADS,
        samples=len(shapes) * POINTS,
    )


def deformable_call(op: str, backend: str | None, params: Mapping[str, Any], maker: Maker) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A forward call, and the tensors that a training step wants gradients of; the same samples for all operators.

    Raises:
        ImpossibleError: the rival is not installed, or does not run on the device.
    """
    shapes = levels_of(str(params["pixels"]))
    sizes = deformable_sizes(params, maker.dtype.itemsize)
    value = maker.normal(sizes.batch, sizes.pixels, HEADS, sizes.width // HEADS)
    samples = (sizes.batch, sizes.queries, HEADS, len(shapes), POINTS)
    offsets, logits = SPREAD * maker.normal(*samples, 2), maker.normal(*samples)
    points = torch.cat([pixel_centres(shape, value.device, maker.dtype) for shape in shapes])
    if op == DEFORMABLE_ATTENTION_FROM_OFFSETS.name:
        return partial(deformable_attention_from_offsets, value, shapes, points, offsets, logits, backend=backend), [value, offsets, logits]
    size_L12 = torch.tensor([[(columns, rows)] for rows, columns in shapes], device=value.device)
    locations = (points[:, None, None, None] + offsets / size_L12).to(maker.dtype)
    weights = logits.flatten(-2).softmax(-1).view_as(logits)
    wanted = [value, locations, weights]
    if op == DEFORMABLE_ATTENTION.name:
        return partial(deformable_attention, value, shapes, locations, weights, backend=backend), wanted
    try:
        rival = importlib.import_module(RIVAL).ms_deform_attn
    except ImportError as error:
        raise ImpossibleError(f"no {RIVAL.replace('_', '-')}: {error}; it is on PyPI, without wheels for every torch") from None
    table = torch.tensor(shapes, device=value.device)
    starts = torch.tensor([0, *(rows * columns for rows, columns in shapes[:-1])], device=value.device).cumsum(0)
    return partial(rival, value, table, starts, locations, weights), wanted
