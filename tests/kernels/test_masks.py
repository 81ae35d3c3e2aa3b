"""Every form of a mask says the same, to every backend, and a wrong one is named."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from emca_kernels import pool_prototypes, select_prototypes
from emca_kernels.masks import BoolMask, EmbeddingMask, LogitMask, Mask, PackedMask, allowed_of, from_parts, parts_of
from torch import Tensor

BATCH, QUERIES, PIXELS = 2, 5, 37


def forms(allowed: Tensor) -> list[Mask]:
    logits = torch.where(allowed, torch.rand(allowed.shape), -1 - torch.rand(allowed.shape))
    # a feature per pixel: the embedding is the logits
    identity = torch.eye(allowed.shape[-1]).expand(len(allowed), -1, -1)
    return [BoolMask(allowed), PackedMask.pack(allowed), LogitMask(logits), EmbeddingMask(logits, identity)]


@pytest.mark.parametrize("pixels", [1, 31, 32, 33, 100])
def test_every_form_allows_the_same(pixels: int) -> None:
    allowed = torch.rand(BATCH, QUERIES, pixels) < 0.5
    for mask in forms(allowed):
        assert torch.equal(mask.allowed(), allowed)


def test_a_bit_is_a_pixel_and_the_words_are_signed() -> None:
    allowed = torch.zeros(1, 1, 40, dtype=torch.bool)
    allowed[..., [0, 31, 33]] = True
    assert PackedMask.pack(allowed).words_BQW.tolist() == [[[1 - 2**31, 2]]]


def test_a_logit_of_zero_allows() -> None:
    logits = torch.tensor([[[0.0, -0.0, -1e-30, 1e-30]]])
    assert LogitMask(logits).allowed().tolist() == [[[True, True, False, True]]]


def test_a_mask_comes_through_the_boundary_of_an_operator() -> None:
    for mask in forms(torch.rand(BATCH, QUERIES, PIXELS) < 0.5):
        again = from_parts(*parts_of(mask), PIXELS)
        assert type(again) is type(mask)
        assert torch.equal(mask.allowed(), again.allowed())
    assert from_parts(*parts_of(None), PIXELS) is None
    assert allowed_of(None) is None


@pytest.mark.parametrize("backend", ["reference", None])
def test_operators_serve_every_form_alike(backend: str | None) -> None:
    features, queries = torch.randn(BATCH, PIXELS, 8, requires_grad=True), torch.randn(BATCH, QUERIES, 8)
    allowed = torch.rand(BATCH, QUERIES, PIXELS) < 0.3
    indices, _ = select_prototypes(features, queries, allowed, k=2, backend=backend)
    pooled = pool_prototypes(features, queries, allowed, backend=backend)
    (gradient,) = torch.autograd.grad(pooled.sum(), features)
    for mask in forms(allowed):
        assert torch.equal(select_prototypes(features, queries, mask, k=2, backend=backend)[0], indices)
        again = pool_prototypes(features, queries, mask, backend=backend)
        assert torch.equal(again, pooled)
        assert torch.equal(torch.autograd.grad(again.sum(), features)[0], gradient)


def test_no_gradient_flows_through_a_mask() -> None:
    embedding, mask_features = torch.randn(BATCH, QUERIES, 4, requires_grad=True), torch.randn(BATCH, PIXELS, 4, requires_grad=True)
    features = torch.randn(BATCH, PIXELS, 8, requires_grad=True)
    pool_prototypes(features, None, EmbeddingMask(embedding, mask_features)).sum().backward()
    assert features.grad is not None
    assert embedding.grad is None
    assert mask_features.grad is None


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (
            PackedMask(torch.zeros(2, 5, 2), 37),
            TypeError,
            "words_BQW must be a int32 tensor [B, Q, W], a bit per pixel; found",
        ),
        (PackedMask(torch.zeros(2, 5, 3, dtype=torch.int32), 37), ValueError, "words_BQW has shape [2, 5, 3], expected [B=2, Q=5, W=2]"),
        (PackedMask(torch.zeros(2, 5, 2, dtype=torch.int32), 38), ValueError, "PackedMask has pixels=38, expected P=37"),
        (LogitMask(torch.zeros(2, 5, 38)), ValueError, "logits_BQP has shape [2, 5, 38], expected [B=2, Q=5, P=37]"),
        (LogitMask(torch.zeros(2, 5, 37, dtype=torch.int32)), TypeError, "logits_BQP must be floating point, found torch.int32"),
        (
            EmbeddingMask(torch.zeros(2, 5, 4), torch.zeros(2, 37, 3)),
            ValueError,
            "features_BPE has shape [2, 37, 3], expected [B=2, P=37, E=4]",
        ),
        (EmbeddingMask(torch.zeros(2, 5, 4), torch.zeros(2, 37, 4).double()), TypeError, "features_BPE is torch.float64, embedding_BQE"),
        ("all", TypeError, "allowed must be a bool tensor [B, Q, P], True = may be chosen; found str"),
    ],
)
def test_a_wrong_mask_is_named(mask: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        select_prototypes(torch.zeros(2, 37, 8), torch.zeros(2, 5, 8), mask)
