"""Selection against a loop over pixels in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emca_kernels import select_prototypes
from torch import Tensor

MASKS = ("none", "random", "empty rows", "all empty", "full", "single pixel")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WIDTH = 16


def make_allowed(kind: str, batch: int, queries: int, pixels: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind in ("full", "all empty"):
        return torch.full((batch, queries, pixels), kind == "full")
    if kind == "single pixel":
        return torch.nn.functional.one_hot(torch.randint(pixels, (batch, queries)), pixels).bool()
    allowed = torch.rand(batch, queries, pixels) < 0.3
    if kind == "empty rows":
        allowed[:, ::2] = False
    return allowed


def oracle(features: Tensor, queries: Tensor, allowed: Tensor | None, k: int, heads: int) -> tuple[np.ndarray, np.ndarray]:
    features_np, queries_np = features.double().numpy(), queries.double().numpy()
    (batch, pixels, width), count = features_np.shape, queries_np.shape[1]
    indices = np.zeros((batch, count, heads, k), dtype=np.int64)
    scores = np.full((batch, count, heads, k), -np.inf)
    part = width // heads
    for b in range(batch):
        for q in range(count):
            candidates = list(range(pixels)) if allowed is None else np.flatnonzero(allowed[b, q].numpy()).tolist()
            candidates = candidates or list(range(pixels))
            for m in range(heads):
                channels = slice(m * part, (m + 1) * part)
                similarity = [float(features_np[b, p, channels] @ queries_np[b, q, channels]) for p in candidates]
                order = sorted(range(len(candidates)), key=lambda i: (-similarity[i], candidates[i]))[:k]
                indices[b, q, m] = candidates[order[0]]
                for slot, i in enumerate(order):
                    indices[b, q, m, slot], scores[b, q, m, slot] = candidates[i], similarity[i]
    return indices, scores


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("queries", [1, 15, 37])
@pytest.mark.parametrize(("pixels", "k"), [(1, 1), (7, 1), (7, 2), (7, 4), (255, 1), (255, 2), (255, 4)])
@pytest.mark.parametrize("heads", [1, 2, 8])
def test_float64_agrees_with_a_loop_over_pixels(heads: int, pixels: int, k: int, queries: int, mask: str) -> None:
    batch = 1 if pixels * queries > 5000 else 2
    features = torch.randn(batch, pixels, WIDTH, dtype=torch.float64)
    asking = torch.randn(batch, queries, WIDTH, dtype=torch.float64)
    allowed = make_allowed(mask, batch, queries, pixels)
    indices, scores = select_prototypes(features, asking, allowed, k=k, heads=heads)
    wanted_indices, wanted_scores = oracle(features, asking, allowed, k, heads)
    assert indices.dtype == torch.int64
    assert np.array_equal(indices.numpy(), wanted_indices)
    np.testing.assert_allclose(scores.numpy(), wanted_scores, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", ["none", "random", "empty rows"])
@pytest.mark.parametrize(("k", "heads"), [(1, 1), (4, 1), (2, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_stays_within_rounding_of_the_best_score(dtype: torch.dtype, k: int, heads: int, mask: str) -> None:
    features, asking = torch.randn(2, 63, WIDTH).to(dtype), torch.randn(2, 15, WIDTH).to(dtype)
    allowed = make_allowed(mask, 2, 15, 63)
    indices, scores = select_prototypes(features, asking, allowed, k=k, heads=heads)
    assert scores.dtype == dtype
    _, best = oracle(features, asking, allowed, k, heads)
    similarity = torch.einsum("bpmd,bqmd->bqmp", features.double().unflatten(-1, (heads, -1)), asking.double().unflatten(-1, (heads, -1)))
    magnitude = torch.einsum(
        "bpmd,bqmd->bqmp", features.double().abs().unflatten(-1, (heads, -1)), asking.double().abs().unflatten(-1, (heads, -1))
    )
    tolerance = 4 * torch.finfo(dtype).eps * magnitude.max().item()
    chosen = similarity.gather(-1, indices)
    filled = torch.from_numpy(np.isfinite(best))
    assert torch.equal(filled, scores.isfinite())
    assert (torch.from_numpy(best) - chosen)[filled].abs().max() <= tolerance
    assert (scores.double() - chosen)[filled].abs().max() <= tolerance


@pytest.mark.parametrize("mask", ["none", "random", "empty rows", "single pixel"])
@pytest.mark.parametrize(("k", "heads"), [(1, 1), (1, 2), (2, 1), (4, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lowest_index(dtype: torch.dtype, k: int, heads: int, mask: str) -> None:
    features = torch.randint(-2, 3, (2, 255, WIDTH)).to(dtype)
    asking = torch.randint(-2, 3, (2, 15, WIDTH)).to(dtype)
    asking[:, 0] = 0
    allowed = make_allowed(mask, 2, 15, 255)
    indices, scores = select_prototypes(features, asking, allowed, k=k, heads=heads)
    wanted_indices, wanted_scores = oracle(features, asking, allowed, k, heads)
    assert np.array_equal(indices.numpy(), wanted_indices)
    assert np.array_equal(scores.double().numpy(), wanted_scores)


@pytest.mark.parametrize("k", [1, 3])
def test_a_blocked_pixel_never_wins_over_negative_scores(k: int) -> None:
    features, asking = -torch.rand(2, 33, 8) - 0.1, torch.rand(2, 5, 8) + 0.1
    features[:, 7] = 9.0
    allowed = torch.rand(2, 5, 33) < 0.5
    allowed[..., 7] = False
    allowed[..., 1:4] = True
    indices, scores = select_prototypes(features, asking, allowed, k=k)
    assert (indices != 7).all()
    assert allowed.gather(-1, indices[:, :, 0]).all()
    assert (scores < 0).all()


def test_slots_beyond_the_allowed_pixels_repeat_the_first_with_score_minus_infinity() -> None:
    allowed = torch.zeros(1, 2, 9, dtype=torch.bool)
    allowed[0, 0, [3, 5]] = True
    allowed[0, 1, 8] = True
    indices, scores = select_prototypes(torch.randn(1, 9, 8), torch.randn(1, 2, 8), allowed, k=4, heads=2)
    assert {*indices[0, 0, 0, :2].tolist()} == {3, 5}
    assert (indices[0, 0, :, 2:] == indices[0, 0, :, :1]).all()
    assert (indices[0, 1] == 8).all()
    assert torch.isneginf(scores[0, 0, :, 2:]).all()
    assert torch.isneginf(scores[0, 1, :, 1:]).all()
    assert scores[0, 0, :, :2].isfinite().all()


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("heads", [1, 2])
def test_strides_of_the_inputs_do_not_matter(heads: int, k: int) -> None:
    features = torch.randn(2, 8, 42).mT[:, ::2]
    asking = torch.randn(11, 2, 16).transpose(0, 1)[..., 4:12]
    allowed = (torch.rand(2, 21, 11) < 0.4).mT
    assert not any(tensor.is_contiguous() for tensor in (features, asking, allowed))
    strided = select_prototypes(features, asking, allowed, k=k, heads=heads)
    packed = select_prototypes(features.contiguous(), asking.contiguous(), allowed.contiguous(), k=k, heads=heads)
    assert torch.equal(strided[0], packed[0])
    torch.testing.assert_close(strided[1], packed[1])


def test_expanded_inputs_are_read_like_copies() -> None:
    features, asking = torch.randn(1, 13, 8).expand(3, -1, -1), torch.randn(1, 5, 8).expand(3, -1, -1)
    allowed = (torch.rand(1, 1, 13) < 0.5).expand(3, 5, -1)
    expanded = select_prototypes(features, asking, allowed, k=2)
    copied = select_prototypes(features.clone(), asking.clone(), allowed.clone(), k=2)
    assert torch.equal(expanded[0], copied[0])


@pytest.mark.parametrize(("batch", "queries"), [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("k", [1, 2])
def test_no_images_or_no_queries_give_empty_results(batch: int, queries: int, k: int) -> None:
    allowed = torch.ones(batch, queries, 7, dtype=torch.bool)
    for mask in (None, allowed):
        indices, scores = select_prototypes(torch.randn(batch, 7, 8), torch.randn(batch, queries, 8), mask, k=k, heads=2)
        assert indices.shape == scores.shape == (batch, queries, 2, k)


@pytest.mark.parametrize("k", [1, 2])
def test_no_gradient_flows(k: int) -> None:
    features, asking = torch.randn(1, 7, 8, requires_grad=True), torch.randn(1, 3, 8, requires_grad=True)
    indices, scores = select_prototypes(features, asking, k=k)
    assert not scores.requires_grad
    assert not indices.requires_grad


def test_inputs_are_left_as_they_are() -> None:
    features, asking, allowed = torch.randn(1, 7, 8), torch.randn(1, 3, 8), torch.rand(1, 3, 7) < 0.2
    before = [tensor.clone() for tensor in (features, asking, allowed)]
    select_prototypes(features, asking, allowed, k=2)
    assert all(torch.equal(*pair) for pair in zip(before, (features, asking, allowed), strict=True))
