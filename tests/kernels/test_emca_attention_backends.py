"""What serves a whole layer where no kernel of its own does."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from emca_kernels import Projections, emca_attention
from emca_kernels.backends import backend_named, record_backends
from emca_kernels.emca_attention.arguments import SELECTIONS
from emca_kernels.masks import EmbeddingMask, PackedMask
from emca_kernels.native import library
from emca_kernels.triton import runtime
from torch import Tensor


def inputs(width: int = 24) -> tuple[Tensor, Tensor, Projections]:
    features, queries = torch.randn(2, 130, width), torch.randn(2, 15, width)
    square, line = (width, width), (width,)
    shapes = (square, line, square, line, square, line, line, square, line)
    return features, queries, Projections(*(torch.randn(shape) / width**0.5 for shape in shapes))


@pytest.mark.skipif(library.unavailable() is not None, reason="the native library cannot be built here")
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("kind", ["packed", "embedding"])
def test_composed_of_faster_parts_it_is_the_same_layer(selection: str, kind: str) -> None:
    features, queries, projections = inputs()
    mask = (
        PackedMask.pack(torch.rand(2, 15, 130) < 0.3) if kind == "packed" else EmbeddingMask(torch.randn(2, 15, 5), torch.randn(2, 130, 5))
    )
    options = {"position": torch.randn(130, 24), "query_position": torch.randn(15, 24), "selection": selection, "residual": "raw"}
    with record_backends() as served:
        found = emca_attention(features, queries, mask, projections, backend="composed", **options)
    assert served["emca_attention"].startswith("composed")
    assert served["pool_prototypes" if selection != "argmax" else "select_prototypes"].startswith("native")
    truth = emca_attention(features, queries, mask, projections, backend="reference", **options)
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_its_gradients_are_those_of_the_reference(selection: str) -> None:
    features, queries, projections = inputs()
    allowed = torch.rand(2, 15, 130) < 0.3
    gradients = []
    served = "composed" if library.unavailable() is None else "reference"
    for backend, dtype in ((served, torch.float32), ("reference", torch.float64)):
        leaves = [tensor.to(dtype).clone().requires_grad_() for tensor in (features, queries, *projections)]
        updated = emca_attention(leaves[0], leaves[1], allowed, Projections(*leaves[2:]), selection=selection, backend=backend)
        gradients.append(torch.autograd.grad(updated.square().sum(), leaves, allow_unused=True))
    for found, truth in zip(*gradients, strict=True):
        # by norm: single elements of a gradient cancel, and keep few digits in float32
        assert (found - truth).norm() <= 1e-4 * truth.norm()


def test_composing_the_references_own_parts_is_no_backend() -> None:
    features, queries, projections = inputs()
    features, queries, double = features.double(), queries.double(), Projections(*(parameter.double() for parameter in projections))
    if backend_named("select_prototypes", "native").refuses(features, queries):
        with pytest.raises(ValueError, match=r"composed.* cannot serve this call of emca_attention: its parts would be the reference's"):
            emca_attention(features, queries, None, double, backend="composed")
    meta = backend_named("emca_attention", "composed").refuses(features.to("meta"), queries.to("meta"))
    assert meta == "its parts would be the reference's"


def test_triton_refuses_rows_that_do_not_fit_on_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    runtime.missing.cache_clear()
    triton = backend_named("emca_attention", "triton")
    features, queries = torch.zeros(1, 7, 256), torch.zeros(1, 3, 256)
    assert triton.refuses(features, queries) is None
    assert triton.refuses(features, queries, None, None, torch.zeros(256, 256)) is None
    assert triton.refuses(features, queries, None, None, torch.zeros(264, 256)) == "264 channels, at most 256"
    assert triton.refuses(torch.zeros(1, 7, 272), torch.zeros(1, 3, 272)) == "272 channels, at most 256"
    assert triton.refuses(features, torch.zeros(1, 0, 256)) == "empty tensors"
    runtime.missing.cache_clear()
