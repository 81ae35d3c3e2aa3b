"""Modulated deformable convolution against a loop over taps in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from emca_kernels import deformable_conv
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

GEOMETRIES = [
    {"stride": 1, "padding": 1, "dilation": 1},
    {"stride": 2, "padding": 0, "dilation": 1},
    {"stride": 1, "padding": 3, "dilation": 2},
    {"stride": 3, "padding": 2, "dilation": 1},
]


def bilinear(values_hw: np.ndarray, y: float, x: float) -> float:
    """Value at pixel coordinates, zero beyond the border."""
    top, left = math.floor(y), math.floor(x)
    total = 0.0
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < values_hw.shape[0] and 0 <= column < values_hw.shape[1]:
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * values_hw[row, column]
    return total


def oracle(features: Tensor, offsets: Tensor, masks: Tensor, weight: Tensor, *, stride: int, padding: int, dilation: int) -> np.ndarray:
    values, moves, shares, kernel = (tensor.double().numpy() for tensor in (features, offsets, masks, weight))
    batch, _, height, width = shares.shape
    outputs, inputs, rows, columns = kernel.shape
    result = np.zeros((batch, outputs, height, width))
    for b, y, x, row, column in np.ndindex(batch, height, width, rows, columns):
        tap = row * columns + column
        at_y = y * stride - padding + row * dilation + moves[b, 2 * tap, y, x]
        at_x = x * stride - padding + column * dilation + moves[b, 2 * tap + 1, y, x]
        for channel in range(inputs):
            result[b, :, y, x] += kernel[:, channel, row, column] * shares[b, tap, y, x] * bilinear(values[b, channel], at_y, at_x)
    return result


def make_inputs(
    geometry: dict[str, int], *, kernel: tuple[int, int] = (3, 3), size: tuple[int, int] = (5, 7), batch: int = 2
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Offsets that lead between pixels, some beyond the border, none where the bilinear kernel has its kinks."""
    stride, padding, dilation = geometry["stride"], geometry["padding"], geometry["dilation"]
    out = [(side + 2 * padding - dilation * (taps - 1) - 1) // stride + 1 for side, taps in zip(size, kernel, strict=True)]
    taps = kernel[0] * kernel[1]
    features = torch.randn(batch, 4, *size, dtype=torch.float64)
    offsets = torch.randint(-3, 3, (batch, 2 * taps, *out)) + 0.1 + 0.8 * torch.rand(batch, 2 * taps, *out, dtype=torch.float64)
    masks = torch.rand(batch, taps, *out, dtype=torch.float64)
    return features, offsets, masks, torch.randn(3, 4, *kernel, dtype=torch.float64)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (2, 3)])
def test_float64_agrees_with_a_loop(kernel: tuple[int, int], geometry: dict[str, int]) -> None:
    inputs = make_inputs(geometry, kernel=kernel)
    np.testing.assert_allclose(deformable_conv(*inputs, **geometry).numpy(), oracle(*inputs, **geometry), rtol=1e-10, atol=1e-11)


def test_float32_stays_near_float64() -> None:
    inputs = make_inputs(GEOMETRIES[0])
    convolved = deformable_conv(*(tensor.float() for tensor in inputs), **GEOMETRIES[0])
    assert convolved.dtype == torch.float32
    np.testing.assert_allclose(convolved.numpy(), oracle(*inputs, **GEOMETRIES[0]), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_finds_its_pixels_on_a_large_map(dtype: torch.dtype) -> None:
    features, weight = torch.randn(1, 4, 3, 700), torch.randn(2, 4, 3, 3)
    offsets, masks = torch.zeros(1, 18, 3, 700), torch.ones(1, 9, 3, 700)
    convolved = deformable_conv(*(tensor.to(dtype) for tensor in (features, offsets, masks, weight)), padding=1)
    assert convolved.dtype == dtype
    torch.testing.assert_close(convolved, F.conv2d(features.to(dtype), weight.to(dtype), padding=1), rtol=0.02, atol=0.1)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_without_offsets_and_with_masks_of_one_it_is_a_convolution(geometry: dict[str, int]) -> None:
    features, offsets, masks, weight = make_inputs(geometry)
    convolved = deformable_conv(features, torch.zeros_like(offsets), torch.ones_like(masks), weight, **geometry)
    torch.testing.assert_close(convolved, F.conv2d(features, weight, **geometry))


@pytest.mark.parametrize(("down", "right"), [(1, 0), (0, 1), (-1, 2), (0, -3)])
def test_whole_offsets_move_the_image_and_y_comes_first(down: int, right: int) -> None:
    features, offsets, masks, weight = make_inputs(GEOMETRIES[0])
    moves = torch.tensor([down, right], dtype=torch.float64).repeat(9)[:, None, None].expand_as(offsets)
    moved = torch.zeros_like(features)
    height, width = features.shape[-2:]
    for y in range(height):
        for x in range(width):
            if 0 <= y + down < height and 0 <= x + right < width:
                moved[..., y, x] = features[..., y + down, x + right]
    # one tap alone, where a shifted image and a shifted tap are the same also at the border
    weight = weight * F.pad(torch.ones(1, 1, dtype=torch.float64), (1, 1, 1, 1))
    convolved = deformable_conv(features, moves, torch.ones_like(masks), weight, padding=1)
    torch.testing.assert_close(convolved, F.conv2d(moved, weight, padding=1))


def test_every_tap_has_its_own_offset_and_mask() -> None:
    features, offsets, masks, weight = make_inputs(GEOMETRIES[0])
    whole = deformable_conv(features, offsets, masks, weight, padding=1)
    parts = torch.zeros_like(whole)
    for tap in range(9):
        alone = torch.zeros(9, dtype=torch.float64)
        alone[tap] = 1
        parts += deformable_conv(features, offsets, masks * alone[:, None, None], weight, padding=1)
    torch.testing.assert_close(parts, whole)
    doubled = masks.clone()
    doubled[:, 4] *= 2
    centre = weight * F.pad(torch.ones(1, 1, dtype=torch.float64), (1, 1, 1, 1))
    gained = deformable_conv(features, offsets, doubled, weight, padding=1) - whole
    torch.testing.assert_close(gained, deformable_conv(features, offsets, masks, centre, padding=1))


def test_beyond_the_border_are_zeros() -> None:
    features, offsets, masks, weight = make_inputs(GEOMETRIES[0])
    convolved = deformable_conv(features, torch.full_like(offsets, 50.0), masks, weight, padding=1)
    assert not convolved.any()
    half = deformable_conv(
        torch.ones(1, 1, 1, 1), torch.tensor([-0.5, 0.0]).view(1, 2, 1, 1), torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    )
    torch.testing.assert_close(half, torch.full_like(half, 0.5))


@pytest.mark.parametrize("geometry", GEOMETRIES[:3], ids=str)
def test_gradients(geometry: dict[str, int]) -> None:
    inputs = [tensor.requires_grad_() for tensor in make_inputs(geometry, size=(3, 4), kernel=(2, 2), batch=1)]
    assert torch.autograd.gradcheck(lambda *tensors: deformable_conv(*tensors, **geometry), inputs)


def test_strides_of_the_inputs_do_not_matter() -> None:
    inputs = make_inputs(GEOMETRIES[0])
    strided = [tensor.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for tensor in inputs]
    torch.testing.assert_close(deformable_conv(*strided, padding=1), deformable_conv(*inputs, padding=1))


def test_no_images_give_an_empty_result() -> None:
    assert deformable_conv(*make_inputs(GEOMETRIES[0], batch=0), padding=1).shape == (0, 3, 5, 7)


def test_its_multiply_adds_are_those_of_the_convolution() -> None:
    shapes = [(2, 4, 5, 7), (2, 18, 5, 7), (2, 9, 5, 7), (3, 4, 3, 3)]
    with FlopCounterMode(display=False) as counter:
        deformable_conv(*(torch.empty(shape, device="meta") for shape in shapes), padding=1)
    assert counter.get_total_flops() == 2 * 2 * 3 * 4 * 9 * 5 * 7
