"""The sine position embedding against its definition, number by number."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from emca_bench.models.position import sine_position, sine_position_like


def formula(row: int, column: int, shape: tuple[int, int], width: int) -> list[float]:
    half = width // 2
    values = []
    for index, size in ((row, shape[0]), (column, shape[1])):
        position = (index + 1) / (size + 1e-6) * 2 * math.pi
        for channel in range(half):
            angle = position / 10000 ** (2 * (channel // 2) / half)
            values.append(math.sin(angle) if channel % 2 == 0 else math.cos(angle))
    return values


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (16, 5)])
@pytest.mark.parametrize("width", [4, 24])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_formula(shape: tuple[int, int], width: int, dtype: torch.dtype, tolerance: float) -> None:
    embedding = sine_position(shape, width, dtype=dtype)
    wanted = torch.tensor(
        [formula(row, column, shape, width) for row in range(shape[0]) for column in range(shape[1])], dtype=torch.float64
    )
    assert embedding.dtype == dtype
    torch.testing.assert_close(embedding.double(), wanted, rtol=0, atol=tolerance)


def test_the_first_half_is_for_rows_and_the_second_for_columns() -> None:
    embedding = sine_position((3, 7), 8).unflatten(0, (3, 7))
    assert torch.equal(embedding[..., :4], embedding[:, :1, :4].expand(-1, 7, -1))
    assert torch.equal(embedding[..., 4:], embedding[:1, :, 4:].expand(3, -1, -1))
    assert len(embedding.flatten(0, 1).unique(dim=0)) == 21


def test_an_odd_width_is_an_error() -> None:
    with pytest.raises(ValueError, match="width=6 of a sine position embedding must be a multiple of 4"):
        sine_position((3, 7), 6)


def test_kept_positions_serve_training_after_inference_and_follow_device_and_dtype() -> None:
    shape = (3, 5)
    with torch.inference_mode():
        first = sine_position_like(shape, torch.empty(1, 15, 8))
    assert not first.is_inference()
    assert sine_position_like(shape, torch.empty(1, 15, 8)) is first
    assert sine_position_like(shape, torch.empty(1, 15, 8, dtype=torch.float64)).dtype == torch.float64
    assert sine_position_like(shape, torch.empty(1, 15, 8, device="meta")).is_meta
    torch.testing.assert_close(first, sine_position(shape, 8))
    weight = torch.randn(8, requires_grad=True)
    (first * weight).sum().backward()
    torch.testing.assert_close(weight.grad, first.sum(0))


def test_fake_tensors_are_not_kept() -> None:
    with FakeTensorMode():
        assert type(sine_position_like((7, 3), torch.empty(1, 21, 8))) is not torch.Tensor
    assert type(sine_position_like((7, 3), torch.empty(1, 21, 8))) is torch.Tensor
