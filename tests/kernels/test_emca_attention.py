"""The whole layer against its equations, written with loops, and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from emca_kernels import Projections, emca_attention
from emca_kernels.emca_attention.arguments import RESIDUALS, SELECTIONS
from emca_kernels.emca_attention.backward import scatter_rows
from emca_kernels.masks import EmbeddingMask, LogitMask, PackedMask
from torch import Tensor


def make_projections(width: int, keys: int, dtype: torch.dtype = torch.float64) -> Projections:
    shapes = ((keys, width), (keys,), (keys, width), (keys,), (keys, keys), (keys,), (keys,), (width, keys), (width,))
    return Projections(*((torch.randn(shape) / shape[-1] ** 0.5).to(dtype) for shape in shapes))


def make_inputs(batch: int, pixels: int, queries: int, width: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Some queries may look nowhere, some everywhere."""
    allowed = torch.rand(batch, queries, pixels) < 0.3
    allowed[:, ::3] = False
    allowed[:, 1::5] = True
    return {
        "features": torch.randn(batch, pixels, width).to(dtype),
        "queries": torch.randn(batch, queries, width).to(dtype),
        "allowed": allowed,
        "position": torch.randn(1, pixels, width).to(dtype),
        "query_position": torch.randn(queries, width).to(dtype),
    }


def oracle(given: dict[str, Tensor], projections: Projections, *, selection: str, residual: str, scale: float = 1.0) -> np.ndarray:
    """Keys of all pixels, as the equations have it: nothing is folded."""
    features, queries, position, query_position = (
        given[name].double().numpy() for name in ("features", "queries", "position", "query_position")
    )
    w_q, b_q, w_k, b_k, w_a, b_a, alpha, w_out, b_out = (parameter.double().numpy() for parameter in projections)
    result = np.empty_like(queries)
    for b in range(len(queries)):
        keys = (features[b] + position[0]) @ w_k.T + b_k
        for q in range(queries.shape[1]):
            asked = w_q @ (queries[b, q] + query_position[q]) + b_q
            seen = np.flatnonzero(given["allowed"][b, q].numpy())
            seen = seen if len(seen) else np.arange(len(keys))
            scores = scale * (keys[seen] @ asked)
            if selection == "argmax":
                prototype = keys[seen[scores.argmax()]]
            else:
                weights = np.exp(scores - scores.max()) if selection == "softmax" else np.ones(len(seen))
                prototype = weights / weights.sum() @ keys[seen]
            product = w_a @ (asked * prototype) + b_a
            reweighted = alpha * product / max(np.linalg.norm(product), 1e-12) + prototype
            result[b, q] = w_out @ reweighted + b_out + (asked if residual == "projected" else queries[b, q])
    return result


def call(given: dict[str, Tensor], projections: Projections, **options: Any) -> Tensor:
    return emca_attention(
        given["features"],
        given["queries"],
        given["allowed"],
        projections,
        position=given["position"],
        query_position=given["query_position"],
        **options,
    )


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(("pixels", "queries", "width", "keys"), [(1, 1, 1, 1), (7, 15, 8, 8), (255, 37, 16, 24)])
def test_float64_agrees_with_the_equations(pixels: int, queries: int, width: int, keys: int, selection: str, residual: str) -> None:
    if residual == "projected":
        keys = width
    given, projections = make_inputs(2, pixels, queries, width), make_projections(width, keys)
    scale = torch.tensor(0.37, dtype=torch.float64) if selection == "softmax" else None
    attended = call(given, projections, selection=selection, residual=residual, scale=scale)
    wanted = oracle(given, projections, selection=selection, residual=residual, scale=1.0 if scale is None else scale.item())
    np.testing.assert_allclose(attended.numpy(), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_masks_of_every_form_are_the_same_mask(selection: str) -> None:
    given, projections = make_inputs(2, 45, 9, 8), make_projections(8, 8)
    embedding, level = torch.randn(2, 9, 4, dtype=torch.float64), torch.randn(2, 45, 4, dtype=torch.float64)
    logits = embedding @ level.mT
    given["allowed"] = logits >= 0
    wanted = call(given, projections, selection=selection)
    for mask in (LogitMask(logits), PackedMask.pack(logits >= 0), EmbeddingMask(embedding, level)):
        assert torch.equal(call({**given, "allowed": mask}, projections, selection=selection), wanted)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_every_gradient(selection: str, residual: str) -> None:
    given, projections = make_inputs(2, 7, 4, 3), make_projections(3, 3)
    scale = torch.tensor(0.7, dtype=torch.float64) if selection == "softmax" else None
    names = [name for name in given if name != "allowed"]
    wanted = [*(given[name] for name in names), *projections, *([scale] if scale is not None else [])]
    for tensor in wanted:
        tensor.requires_grad_()

    def attend(*tensors: Tensor) -> Tensor:
        at = len(names)
        return call(
            {**given, **dict(zip(names, tensors[:at], strict=True))},
            Projections(*tensors[at : at + 9]),
            selection=selection,
            residual=residual,
            scale=None if scale is None else tensors[-1],
        )

    assert torch.autograd.gradcheck(attend, tuple(wanted))


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    given, projections = make_inputs(1, 7, 4, 3), make_projections(3, 3)
    given["queries"].requires_grad_()
    call(given, projections).sum().backward()
    assert given["queries"].grad is not None
    assert given["features"].grad is None
    assert all(parameter.grad is None for parameter in projections)


def test_rows_of_one_pixel_are_summed_alike_in_any_order() -> None:
    features, rows = torch.randn(2, 11, 8), torch.randn(2, 33, 8)
    indices = torch.randint(0, 3, (2, 33))
    scattered = scatter_rows(rows, indices, features)
    wanted = torch.zeros(2, 11, 8, dtype=torch.float64)
    for b in range(2):
        for q in range(33):
            wanted[b, indices[b, q]] += rows[b, q].double()
    torch.testing.assert_close(scattered.double(), wanted, rtol=1e-5, atol=1e-5)
    for _ in range(3):
        assert torch.equal(scatter_rows(rows, indices, features), scattered)


def test_a_product_of_zero_has_finite_gradients() -> None:
    given, projections = make_inputs(1, 7, 4, 3), make_projections(3, 3)
    projections.product_weight_DD.zero_()
    projections.product_bias_D.zero_()
    for parameter in projections:
        parameter.requires_grad_()
    call(given, projections).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in projections)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(("batch", "queries"), [(0, 3), (2, 0)])
def test_no_images_or_no_queries_give_empty_results(batch: int, queries: int, selection: str) -> None:
    given, projections = make_inputs(batch, 7, queries, 4), make_projections(4, 4)
    given["features"].requires_grad_()
    attended = call(given, projections, selection=selection)
    assert attended.shape == (batch, queries, 4)
    attended.sum().backward()
    assert given["features"].grad is not None
    assert not given["features"].grad.any()


def wrong(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    given: dict[str, Any] = {**make_inputs(2, 7, 5, 4), "projections": make_projections(4, 4)}
    given |= change(given)
    return given


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda g: {"features": g["features"][0]}, ValueError, r"features has shape \[7, 4\], expected \[B, P, C\]"),
        (lambda g: {"features": g["features"][:, :0], "allowed": None, "position": None}, ValueError, "P=0 pixels, expected at least one"),
        (lambda g: {"queries": g["queries"][..., :3]}, ValueError, r"queries has shape \[2, 5, 3\], expected \[B=2, Q, C=4\]"),
        (lambda g: {"queries": g["queries"].float()}, TypeError, "queries is torch.float32, features torch.float64"),
        (lambda g: {"allowed": g["allowed"][:, :4]}, ValueError, r"allowed has shape \[2, 4, 7\], expected \[B=2, Q=5, P=7\]"),
        (lambda g: {"allowed": g["allowed"].double()}, TypeError, "allowed must be a bool tensor"),
        (
            lambda g: {"query_position": torch.randn(3, 5, 4).double()},
            ValueError,
            r"query_position has shape \[3, 5, 4\], expected \[B=2, N=5, C=4\]",
        ),
        (
            lambda g: {"projections": g["projections"]._replace(key_weight_DC=torch.randn(3, 4).double())},
            ValueError,
            r"key_weight has shape \[3, 4\], expected \[D=4, C=4\]",
        ),
        (
            lambda g: {"projections": g["projections"]._replace(product_weight_DD=torch.randn(4, 3).double())},
            ValueError,
            r"product_weight has shape \[4, 3\]",
        ),
        (lambda g: {"selection": "best"}, ValueError, "selection='best', expected one of argmax, softmax, mean"),
        (lambda g: {"residual": "none"}, ValueError, "residual='none', expected one of projected, raw"),
        (lambda g: {"projections": make_projections(4, 6)}, ValueError, "residual='projected' adds D=6 channels to C=4"),
        (lambda g: {"scale": torch.ones(()).double()}, ValueError, "scale of shape .* with selection='argmax'"),
        (lambda g: {"selection": "mean", "allowed": None}, ValueError, "selection='mean' needs allowed"),
        (lambda g: {"backend": "fastest"}, ValueError, "backend='fastest' is no backend of emca_attention"),
    ],
)
def test_errors_name_the_argument(change: Callable[[dict[str, Any]], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        emca_attention(**wrong(change))
