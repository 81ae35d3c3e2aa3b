"""Selection by Triton kernels against the float64 reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from emca_kernels import select_prototypes
from emca_kernels.masks import BoolMask
from emca_kernels.select_prototypes import reference, triton_kernels
from torch import Tensor

if TYPE_CHECKING:
    from conftest import Inputs, Maker

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASKS = ("none", "bool", "packed", "logit", "embedding")
HEADS_AND_K = ((1, 1), (4, 1), (1, 3), (8, 3), (1, 16))
CASES = [(dtype, mask, *HEADS_AND_K[(i + j) % 5]) for i, dtype in enumerate(DTYPES) for j, mask in enumerate(MASKS)]


def truth(inputs: Inputs, k: int) -> tuple[Tensor, Tensor]:
    return reference.select_prototypes(inputs.located.double(), inputs.queries.double(), inputs.allowed, None, k=k, heads=inputs.heads)


def found(inputs: Inputs, k: int, splits: int | None = 3) -> tuple[Tensor, Tensor]:
    return triton_kernels.select_prototypes(
        inputs.features, inputs.queries, inputs.mask, inputs.position, k=k, heads=inputs.heads, splits=splits
    )


def assert_exact(inputs: Inputs, k: int) -> None:
    indices, scores = found(inputs, k)
    wanted, best = truth(inputs, k)
    assert indices.dtype == torch.int64
    assert scores.dtype == inputs.features.dtype
    assert torch.equal(indices, wanted)
    # sums of small integers are exact; bfloat16 holds them to 256
    torch.testing.assert_close(scores.double(), best, rtol=0 if inputs.features.dtype != torch.bfloat16 else 2**-7, atol=0)


@pytest.mark.parametrize(("dtype", "mask", "heads", "k"), CASES)
def test_ties_of_small_integers_go_to_the_lowest_index(make: Maker, dtype: torch.dtype, mask: str, heads: int, k: int) -> None:
    # k is at most P
    inputs = make(dtype, mask, heads=heads, pixels={1: None, 3: 7 if heads == 8 else 100, 16: 255}[k], queries=15 if k == 16 else None)
    assert_exact(inputs, k)


@pytest.mark.parametrize("pixels", [1, 7, 255, 1000, 4099])
def test_any_number_of_pixels(make: Maker, pixels: int) -> None:
    assert_exact(make(torch.float32, "bool", pixels=pixels, queries=15, width=16), 1)


@pytest.mark.parametrize("queries", [1, 15, 37, 100, 130])
def test_any_number_of_queries(make: Maker, queries: int) -> None:
    assert_exact(make(torch.float16, "packed", pixels=255, queries=queries, width=16), 1)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("allowed", [True, False])
def test_full_and_empty_masks_choose_everywhere(make: Maker, allowed: bool, k: int) -> None:
    inputs = make(torch.float32, "bool", pixels=255, queries=15)
    inputs.mask = None
    everywhere = found(inputs, k)
    inputs.mask = BoolMask(torch.full((inputs.features.shape[0], 15, 255), allowed, device=inputs.features.device))
    masked = found(inputs, k)
    assert torch.equal(masked[0], everywhere[0])
    assert torch.equal(masked[1], everywhere[1])


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("mask", ["none", "bool"])
def test_padding_never_wins_over_negative_scores(make: Maker, mask: str, k: int) -> None:
    inputs = make(torch.float32, mask, pixels=37, queries=15, width=8, position=False)
    inputs.features.copy_(-1 - inputs.features.abs())
    inputs.queries.copy_(1 + inputs.queries.abs())
    assert_exact(inputs, k)
    assert (found(inputs, 1)[1] < 0).all()


def test_slots_that_no_allowed_pixel_is_left_for(make: Maker) -> None:
    inputs = make(torch.float32, "none", pixels=100, queries=3, width=8, position=False)
    allowed = torch.zeros(inputs.features.shape[0], 3, 100, dtype=torch.bool, device=inputs.features.device)
    allowed[:, 0, [5, 70]] = True
    allowed[:, 1, 99] = True
    inputs.mask = BoolMask(allowed)
    assert_exact(inputs, 3)
    indices, scores = found(inputs, 3)
    assert torch.isneginf(scores[:, 0, 0, 2]).all()
    assert (indices[:, 1] == 99).all()
    assert scores[:, 2].isfinite().all()


@pytest.mark.parametrize("mask", ["bool", "embedding"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_numbers_stay_within_rounding_of_the_best(make: Maker, dtype: torch.dtype, mask: str) -> None:
    inputs = make(dtype, mask, pixels=255, queries=37, width=64, integers=mask == "embedding")
    if mask == "embedding":
        inputs.features.normal_()
        inputs.queries.normal_()
    indices, scores = found(inputs, 1)
    _, best = truth(inputs, 1)
    similarity = (inputs.queries.double() @ inputs.located.double().mT)[:, :, None]
    chosen = similarity.gather(-1, indices)
    # sums are float32, whatever the inputs
    tolerance = 64 * torch.finfo(torch.float32).eps * similarity.abs().max()
    assert (best - chosen).abs().max() <= tolerance
    torch.testing.assert_close(scores.double(), chosen, rtol=2 * torch.finfo(dtype).eps, atol=float(tolerance))


@pytest.mark.parametrize(("heads", "k"), [(1, 1), (2, 3)])
def test_the_same_bits_however_the_pixels_are_shared(make: Maker, heads: int, k: int) -> None:
    inputs = make(torch.float32, "bool", pixels=255, queries=15, heads=heads, width=24, integers=False)
    once = found(inputs, k, splits=1)
    for splits in (1, 2, 4, None):
        again = found(inputs, k, splits=splits)
        assert torch.equal(once[0], again[0])
        assert torch.equal(once[1], again[1])


def test_by_the_name_of_the_backend_alone(make: Maker) -> None:
    inputs = make(torch.float32, "embedding", pixels=37, queries=15)
    chosen = select_prototypes(inputs.features, inputs.queries, inputs.mask, position=inputs.position, backend="triton")
    assert torch.equal(chosen[0], truth(inputs, 1)[0])
    other = select_prototypes(inputs.features, inputs.queries, inputs.mask, position=inputs.position, backend="reference")
    assert torch.equal(chosen[0], other[0])
