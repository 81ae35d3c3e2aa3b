"""Multi-scale deformable attention against a loop over sampled points in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from emca_kernels import deformable_attention
from torch import Tensor

Shapes = list[tuple[int, int]]

SHAPES: Shapes = [(3, 5), (1, 2), (4, 1)]


def bilinear(values_hwd: np.ndarray, x: float, y: float) -> np.ndarray:
    """Value at pixel coordinates, zero beyond the border."""
    height, width = values_hwd.shape[:2]
    left, top = math.floor(x), math.floor(y)
    total = np.zeros(values_hwd.shape[2])
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < height and 0 <= column < width:
                total += (1 - abs(x - column)) * (1 - abs(y - row)) * values_hwd[row, column]
    return total


def oracle(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> np.ndarray:
    values, at, shares = (tensor.double().numpy() for tensor in (value, locations, weights))
    batch, queries, heads, _, points, _ = at.shape
    result = np.zeros((batch, queries, heads, value.shape[-1]))
    for b, q, m, n in np.ndindex(batch, queries, heads, points):
        start = 0
        for level, (height, width) in enumerate(shapes):
            level_map = values[b, start : start + height * width, m].reshape(height, width, -1)
            x, y = at[b, q, m, level, n]
            result[b, q, m] += shares[b, q, m, level, n] * bilinear(level_map, x * width - 0.5, y * height - 0.5)
            start += height * width
    return result.reshape(batch, queries, -1)


def make_inputs(batch: int, queries: int, heads: int, points: int, width: int, shapes: Shapes) -> tuple[Tensor, Tensor, Tensor]:
    """Sampled positions between pixels, some beyond the border, none where the bilinear kernel has its kinks."""
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, width, dtype=torch.float64)
    locations = torch.empty(batch, queries, heads, len(shapes), points, 2, dtype=torch.float64)
    for level, (height, columns) in enumerate(shapes):
        for axis, size in enumerate((columns, height)):
            whole = torch.randint(-2, size + 1, (*locations.shape[:3], points))
            locations[..., level, :, axis] = (whole + 0.1 + 0.8 * torch.rand(whole.shape) + 0.5) / size
    return value, locations, torch.randn(batch, queries, heads, len(shapes), points, dtype=torch.float64)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("points", [1, 4])
@pytest.mark.parametrize("shapes", [SHAPES, SHAPES[:1]])
def test_float64_agrees_with_a_loop(shapes: Shapes, points: int, heads: int) -> None:
    value, locations, weights = make_inputs(2, 7, heads, points, 5, shapes)
    sampled = deformable_attention(value, shapes, locations, weights)
    np.testing.assert_allclose(sampled.numpy(), oracle(value, shapes, locations, weights), rtol=1e-10, atol=1e-11)


def test_float32_stays_near_float64() -> None:
    value, locations, weights = (tensor.float() for tensor in make_inputs(2, 7, 2, 4, 5, SHAPES))
    sampled = deformable_attention(value, SHAPES, locations, weights)
    assert sampled.dtype == torch.float32
    np.testing.assert_allclose(sampled.double().numpy(), oracle(value, SHAPES, locations, weights), atol=1e-4)


def test_a_point_at_a_pixel_centre_reads_that_pixel_of_that_level() -> None:
    value = torch.randn(1, 21, 2, 3)
    for pixel, (level, row, column) in enumerate((s, r, c) for s, (h, w) in enumerate(SHAPES) for r in range(h) for c in range(w)):
        height, width = SHAPES[level]
        locations = torch.zeros(1, 1, 2, 3, 1, 2)
        locations[..., 0], locations[..., 1] = (column + 0.5) / width, (row + 0.5) / height
        weights = torch.zeros(1, 1, 2, 3, 1)
        weights[:, :, :, level] = 1
        torch.testing.assert_close(deformable_attention(value, SHAPES, locations, weights)[0, 0], value[0, pixel].flatten())


def test_gradients() -> None:
    inputs = [tensor.requires_grad_() for tensor in make_inputs(1, 2, 2, 2, 3, SHAPES)]
    assert torch.autograd.gradcheck(lambda value, at, weights: deformable_attention(value, SHAPES, at, weights), inputs)


def test_strides_of_the_inputs_do_not_matter() -> None:
    value, locations, weights = make_inputs(2, 7, 2, 3, 4, SHAPES)
    packed = deformable_attention(value, SHAPES, locations, weights)
    strided = deformable_attention(
        value.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        torch.tensor(SHAPES).tolist(),
        locations.transpose(0, 4).contiguous().transpose(0, 4),
        weights.mT.contiguous().mT,
    )
    torch.testing.assert_close(strided, packed)


def test_no_images_give_an_empty_result() -> None:
    assert deformable_attention(*_split(make_inputs(0, 7, 2, 3, 4, SHAPES))).shape == (0, 7, 8)


def _split(inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, list[tuple[int, int]], Tensor, Tensor]:
    return inputs[0], SHAPES, inputs[1], inputs[2]
