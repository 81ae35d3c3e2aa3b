"""Soft prototypes against a loop over queries in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emca_kernels import pool_prototypes, select_prototypes
from torch import Tensor


def oracle(features: Tensor, queries: Tensor | None, allowed: Tensor, heads: int) -> np.ndarray:
    rows = features.double().numpy()
    (batch, pixels, width), count = rows.shape, allowed.shape[1]
    part = width // heads
    pooled = np.empty((batch, count, heads, part))
    for b in range(batch):
        for q in range(count):
            seen = np.flatnonzero(allowed[b, q].numpy())
            seen = seen if len(seen) else np.arange(pixels)
            for m in range(heads):
                channels = slice(m * part, (m + 1) * part)
                if queries is None:
                    weights = np.full(len(seen), 1 / len(seen))
                else:
                    scores = rows[b, seen, channels] @ queries[b, q, channels].double().numpy()
                    weights = np.exp(scores - scores.max())
                    weights /= weights.sum()
                pooled[b, q, m] = weights @ rows[b, seen, channels]
    return pooled


def random_mask(batch: int, queries: int, pixels: int) -> Tensor:
    """Some queries may look nowhere."""
    allowed = torch.rand(batch, queries, pixels) < 0.3
    allowed[:, ::3] = False
    return allowed


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize(("pixels", "queries"), [(1, 1), (7, 15), (255, 37)])
def test_float64_agrees_with_a_loop(pixels: int, queries: int, heads: int, soft: bool) -> None:
    features = torch.randn(2, pixels, 16, dtype=torch.float64)
    asking = torch.randn(2, queries, 16, dtype=torch.float64) if soft else None
    allowed = random_mask(2, queries, pixels)
    pooled = pool_prototypes(features, asking, allowed, heads=heads)
    np.testing.assert_allclose(pooled.numpy(), oracle(features, asking, allowed, heads), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 6e-2), (torch.float16, 1e-2)])
def test_every_dtype_stays_near_float64(dtype: torch.dtype, tolerance: float, soft: bool) -> None:
    features, asking = torch.randn(2, 63, 8).to(dtype), torch.randn(2, 15, 8).to(dtype) if soft else None
    allowed = random_mask(2, 15, 63)
    pooled = pool_prototypes(features, asking, allowed)
    assert pooled.dtype == dtype
    np.testing.assert_allclose(pooled.double().numpy(), oracle(features, asking, allowed, 1), atol=tolerance)


def test_the_mean_of_many_large_values_does_not_overflow_float16() -> None:
    features = torch.full((1, 4096, 4), 40.0, dtype=torch.float16)
    pooled = pool_prototypes(features, None, torch.ones(1, 2, 4096, dtype=torch.bool))
    torch.testing.assert_close(pooled, torch.full_like(pooled, 40.0))


@pytest.mark.parametrize("heads", [1, 2])
def test_no_mask_is_a_full_mask_and_so_is_an_empty_one(heads: int) -> None:
    features, asking = torch.randn(2, 21, 8), torch.randn(2, 5, 8)
    full, empty = torch.ones(2, 5, 21, dtype=torch.bool), torch.zeros(2, 5, 21, dtype=torch.bool)
    unmasked = pool_prototypes(features, asking, heads=heads)
    for allowed in (full, empty):
        torch.testing.assert_close(pool_prototypes(features, asking, allowed, heads=heads), unmasked)
    mean = features.mean(1, keepdim=True).expand(-1, 5, -1)
    torch.testing.assert_close(pool_prototypes(features, None, empty, heads=heads).flatten(2), mean)


def test_hot_queries_pool_the_selected_pixel() -> None:
    features, asking = torch.randn(2, 33, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    allowed = random_mask(2, 5, 33)
    indices, _ = select_prototypes(features, asking, allowed)
    selected = features.gather(1, indices[:, :, 0].expand(-1, -1, 8))
    torch.testing.assert_close(pool_prototypes(features, 1e9 * asking, allowed)[:, :, 0], selected)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("soft", [True, False])
def test_gradients(soft: bool, heads: int) -> None:
    features = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    asking = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    allowed = random_mask(2, 3, 5)
    if soft:
        assert torch.autograd.gradcheck(lambda f, q: pool_prototypes(f, q, allowed, heads=heads), (features, asking))
    else:
        assert torch.autograd.gradcheck(lambda f: pool_prototypes(f, None, allowed, heads=heads), (features,))


def test_blocked_pixels_get_no_gradient() -> None:
    features = torch.randn(1, 9, 4, requires_grad=True)
    allowed = torch.tensor([[[True, False] * 4 + [True]]])
    pool_prototypes(features, torch.randn(1, 1, 4), allowed).square().sum().backward()
    assert features.grad is not None
    assert torch.equal(features.grad.any(-1), allowed[:, 0])


@pytest.mark.parametrize(("batch", "queries"), [(0, 3), (2, 0)])
@pytest.mark.parametrize("soft", [True, False])
def test_no_images_or_no_queries_give_empty_results(soft: bool, batch: int, queries: int) -> None:
    allowed = torch.ones(batch, queries, 7, dtype=torch.bool)
    pooled = pool_prototypes(torch.randn(batch, 7, 8), torch.randn(batch, queries, 8) if soft else None, allowed, heads=2)
    assert pooled.shape == (batch, queries, 2, 4)


def test_nothing_to_pool_for_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs queries, or allowed, or both"):
        pool_prototypes(torch.randn(1, 7, 8), None)
