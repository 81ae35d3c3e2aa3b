"""Soft prototypes by Triton kernels against the float64 reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from emca_kernels import pool_prototypes
from emca_kernels.masks import BoolMask
from emca_kernels.pool_prototypes import reference, triton_kernels
from torch import Tensor

if TYPE_CHECKING:
    from conftest import Inputs, Maker

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASKS = ("none", "bool", "packed", "logit", "embedding")
MEANS = (("bool", "embedding"), ("packed", "logit"), ("bool", "embedding"))
HEADS = (1, 4, 8)
CASES = [(dtype, mask, HEADS[(i + j) % 3], True) for i, dtype in enumerate(DTYPES) for j, mask in enumerate(MASKS)]
CASES += [(dtype, mask, HEADS[i], False) for i, dtype in enumerate(DTYPES) for mask in MEANS[i]]


def found(inputs: Inputs, soft: bool, splits: int | None = 3) -> tuple[Tensor, Tensor]:
    queries = inputs.queries if soft else None
    return triton_kernels.pool_prototypes(inputs.features, queries, inputs.mask, inputs.position, heads=inputs.heads, splits=splits)


def computed(inputs: Inputs, soft: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    queries = inputs.queries.to(dtype) if soft else None
    return reference.pool_prototypes(inputs.located.to(dtype), queries, inputs.allowed, None, heads=inputs.heads)


@pytest.mark.parametrize(("dtype", "mask", "heads", "soft"), CASES)
def test_as_exact_as_torch_in_the_same_dtype(make: Maker, dtype: torch.dtype, mask: str, heads: int, soft: bool) -> None:
    inputs = make(dtype, mask, heads=heads, integers=mask == "embedding", pixels=7 if heads == 8 else None)
    pooled, logsumexp = found(inputs, soft)
    truth, true_logsumexp = computed(inputs, soft, torch.float64)
    own, _ = computed(inputs, soft, dtype)
    assert pooled.dtype == dtype
    assert logsumexp.dtype == torch.float32
    # and a weight is as uncertain as its score, a float32 number of the size of the logsumexp
    uncertain = 4 * torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * true_logsumexp.abs().max()
    band = uncertain * truth.abs().max()
    assert (pooled - truth).abs().max() <= 2 * (own - truth).abs().max() + band
    torch.testing.assert_close(logsumexp.double(), true_logsumexp, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("pixels", [1, 1000, 4099])
def test_any_number_of_pixels(make: Maker, pixels: int, soft: bool) -> None:
    inputs = make(torch.float32, "bool", pixels=pixels, queries=15, width=16, integers=False)
    torch.testing.assert_close(found(inputs, soft)[0].double(), computed(inputs, soft, torch.float64)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 37, 130])
def test_any_number_of_queries(make: Maker, queries: int) -> None:
    inputs = make(torch.float32, "packed", pixels=100, queries=queries, width=16, integers=False)
    torch.testing.assert_close(found(inputs, True)[0].double(), computed(inputs, True, torch.float64)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("soft", [True, False])
def test_one_allowed_pixel_outweighs_all_that_was_pooled_before(make: Maker, soft: bool, where: str) -> None:
    inputs = make(torch.float32, "none", pixels=255, queries=15, width=16, integers=False, position=False)
    inputs.features[:, 100] = 1e3
    allowed = torch.zeros(inputs.features.shape[0], 15, 255, dtype=torch.bool, device=inputs.features.device)
    pixel = 0 if where == "first" else 254
    allowed[..., pixel] = True
    inputs.mask = BoolMask(allowed)
    pooled, _ = found(inputs, soft)
    torch.testing.assert_close(pooled[:, :, 0], inputs.features[:, pixel, None].expand(-1, 15, -1))


@pytest.mark.parametrize("allowed", [True, False])
def test_full_and_empty_masks_pool_everywhere(make: Maker, allowed: bool) -> None:
    inputs = make(torch.float32, "none", pixels=255, queries=15, integers=False)
    everywhere = found(inputs, True)
    inputs.mask = BoolMask(torch.full((inputs.features.shape[0], 15, 255), allowed, device=inputs.features.device))
    for one, other in zip(found(inputs, True), everywhere, strict=True):
        assert torch.equal(one, other)


def test_large_scores_do_not_overflow(make: Maker) -> None:
    # integers times a power of two: no score is rounded
    inputs = make(torch.float32, "bool", pixels=100, queries=15, width=16, integers=True)
    inputs.queries.mul_(2**13)
    torch.testing.assert_close(found(inputs, True)[0].double(), computed(inputs, True, torch.float64)[0], rtol=1e-2, atol=1e-3)


def test_the_same_call_gives_the_same_bits(make: Maker) -> None:
    inputs = make(torch.float32, "bool", pixels=255, queries=15, integers=False)
    once = found(inputs, True)
    for one, other in zip(found(inputs, True), once, strict=True):
        assert torch.equal(one, other)
    for splits in (1, 2, None):
        for one, other in zip(found(inputs, True, splits=splits), once, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("mask", "soft"), [("none", True), ("bool", True), ("embedding", True), ("packed", False)])
def test_gradients(make: Maker, mask: str, soft: bool) -> None:
    inputs = make(torch.float32, mask, pixels=37, queries=15, heads=2, width=8, position=True)
    inputs.features.normal_()
    inputs.queries.normal_()
    assert inputs.position is not None
    leaves = [inputs.features, inputs.position.clone(), *([inputs.queries] if soft else [])]
    fast, exact = ([leaf.detach().to(dtype).requires_grad_() for leaf in leaves] for dtype in (torch.float32, torch.float64))
    pooled = pool_prototypes(fast[0], fast[2] if soft else None, inputs.mask, heads=inputs.heads, position=fast[1], backend="triton")
    truth, _ = reference.pool_prototypes(exact[0] + exact[1], exact[2] if soft else None, inputs.allowed, None, heads=inputs.heads)
    gradient = torch.randn_like(pooled)
    pooled.backward(gradient)
    truth.backward(gradient.double())
    for one, other in zip(fast, exact, strict=True):
        assert one.grad is not None
        # by norm: a single number may be a difference of large ones
        assert (one.grad.double() - other.grad).norm() <= 1e-5 * other.grad.norm()
