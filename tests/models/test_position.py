"""The sine position embedding against its definition, number by number."""

from __future__ import annotations

import math

import pytest
import torch

from emca_bench.models.position import sine_position


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
