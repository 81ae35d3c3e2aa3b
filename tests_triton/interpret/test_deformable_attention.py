"""Deformable attention by Triton kernels against the float64 reference."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from emca_kernels import deformable_attention, deformable_attention_from_offsets
from emca_kernels.deformable_attention import reference, triton_kernels
from torch import Tensor

if TYPE_CHECKING:
    from conftest import Maker

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(3, 5), (1, 1), (9, 2)]
PIXELS = sum(rows * columns for rows, columns in SHAPES)


class Call(NamedTuple):
    """Arguments from offsets, poison around each."""

    value: Tensor
    points: Tensor
    offsets: Tensor
    logits: Tensor

    def exact(self) -> list[Tensor]:
        return [tensor.double() for tensor in self]

    def placed(self) -> tuple[Tensor, Tensor]:
        """Locations and weights, float32."""
        found = reference.locations_and_weights(SHAPES, self.points.double(), self.offsets.double(), self.logits.double())
        return found[0].float(), found[1].float()


def draw(make: Maker, dtype: torch.dtype, *, width: int | None = None, queries: int | None = None) -> Call:
    choose = random.Random(torch.initial_seed())
    heads, points = choose.choice((1, 3)), choose.choice((1, 2))
    width, queries = width or choose.choice((3, 16, 40)), queries or choose.choice((1, 7, 19))
    print(f"M={heads} N={points} Q={queries} d={width} {dtype}")
    samples = (2, queries, heads, len(SHAPES), points)
    offsets = 3 * torch.randn(*samples, 2)
    offsets[torch.rand(samples) < 0.05] = 5e4
    given = torch.randn(2, PIXELS, heads, width).to(dtype), torch.rand(2, queries, len(SHAPES), 2), offsets.to(dtype)
    return Call(*(make.poisoned(tensor, torch.nan) for tensor in (*given, torch.randn(samples).to(dtype))))


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Within twice the rounding of the result to its dtype, which the interpreter cuts instead, relative to the largest number."""
    assert (found.double() - wanted).abs().max() <= max(2 * torch.finfo(dtype).eps, 1e-5) * wanted.abs().max().clamp(min=1)


@pytest.mark.parametrize(("dtype", "width"), list(zip(DTYPES, (3, 40, 16), strict=True)))
def test_samples_as_the_reference(make: Maker, dtype: torch.dtype, width: int) -> None:
    call = draw(make, dtype, width=width)
    value, *rest = call.exact()
    found = triton_kernels.deformable_attention_from_offsets(call.value, SHAPES, *call[1:])
    assert found.dtype == dtype
    close(found, reference.deformable_attention_from_offsets(value, SHAPES, *rest), dtype)
    locations, weights = call.placed()
    found = triton_kernels.deformable_attention(call.value, SHAPES, locations, weights)
    close(found, reference.deformable_attention(value, SHAPES, locations.double(), weights.double()), dtype)


@pytest.mark.parametrize("queries", [1, 33])
def test_any_number_of_queries(make: Maker, queries: int) -> None:
    call = draw(make, torch.float32, width=32, queries=queries)
    value, *rest = call.exact()
    found = triton_kernels.deformable_attention_from_offsets(call.value, SHAPES, *call[1:])
    close(found, reference.deformable_attention_from_offsets(value, SHAPES, *rest), torch.float32)


@pytest.mark.parametrize(("dtype", "from_offsets"), list(zip(DTYPES, (True, False, True), strict=True)))
def test_gradients(make: Maker, dtype: torch.dtype, from_offsets: bool) -> None:
    call = draw(make, dtype)
    given = call if from_offsets else (call.value, *call.placed())
    operator = deformable_attention_from_offsets if from_offsets else deformable_attention
    fast = [tensor.detach().clone().requires_grad_() for tensor in given]
    exact = [tensor.double().requires_grad_() for tensor in given]
    found = operator(fast[0], SHAPES, *fast[1:], backend="triton")
    wanted = operator(exact[0], SHAPES, *exact[1:], backend="reference")
    upstream = torch.randn_like(found)
    for one, other in zip(torch.autograd.grad(found, fast, upstream), torch.autograd.grad(wanted, exact, upstream.double()), strict=True):
        close(one, other, one.dtype)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy computes as asked to
@pytest.mark.parametrize("nonsense", [torch.nan, -torch.inf])
def test_a_position_that_is_not_finite_spoils_its_query_and_head_alone(make: Maker, nonsense: float) -> None:
    call = draw(make, torch.float32, queries=7)
    heads = call.value.shape[2]
    before = triton_kernels.deformable_attention_from_offsets(call.value, SHAPES, *call[1:]).unflatten(-1, (heads, -1))
    call.offsets[0, 0, 0, 2, 0, 1] = nonsense
    after = triton_kernels.deformable_attention_from_offsets(call.value, SHAPES, *call[1:]).unflatten(-1, (heads, -1))
    assert after[0, 0, 0].isnan().all()
    after[0, 0, 0] = before[0, 0, 0]
    assert torch.equal(before, after)


def test_determinism_is_refused_backward_alone(make: Maker) -> None:
    call = draw(make, torch.float32)
    leaf = call.value.clone().requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        result = deformable_attention_from_offsets(leaf, SHAPES, *call[1:], backend="triton")
        with pytest.raises(RuntimeError, match="in no fixed order"):
            result.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
