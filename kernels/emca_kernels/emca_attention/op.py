"""The operator `emca_attention`: checks, backend, call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emca_kernels.autocast import follow_autocast
from emca_kernels.backends import Backend, choose_backend, is_traced, register_backend, serves_all
from emca_kernels.checks import as_large, as_mask, check_mask, check_position, check_same, check_tensor, once_per_signature
from emca_kernels.emca_attention import composed, native, reference
from emca_kernels.emca_attention.arguments import RESIDUALS, SELECTIONS, Attended, Projections
from emca_kernels.emca_attention.backward import backward
from emca_kernels.masks import Mask, allowed_of, from_parts, parts_of
from emca_kernels.native import library
from emca_kernels.registration import register_operator
from emca_kernels.select_prototypes.op import MAX_PIXELS
from emca_kernels.triton import runtime

WIDEST_ON_CHIP = 256
"""Channels of features or keys that the Triton backend carries through the layer."""


def _triton_refuses(features: Tensor, *others: Tensor | None) -> str | None:
    query_weight = others[3] if len(others) > 3 else None
    widest = max(features.shape[-1], 0 if query_weight is None else len(query_weight))
    return runtime.refuses(features, *others) or (f"{widest} channels, at most {WIDEST_ON_CHIP}" if widest > WIDEST_ON_CHIP else None)


register_backend("emca_attention", Backend("reference", reference.emca_attention, serves_all))
register_backend("emca_attention", Backend("composed", composed.emca_attention, composed.refuses, reads_masks=True))
register_backend("emca_attention", Backend("native", native.emca_attention, library.refuses))
register_backend(
    "emca_attention",
    Backend(
        "triton",
        runtime.lazily("emca_kernels.emca_attention.triton_kernels", "emca_attention"),
        _triton_refuses,
        runtime.refuses_unasked,
        reads_masks=True,
    ),
)

_PARAMETERS = ", ".join(f"Tensor {name.rsplit('_', 1)[0]}" for name in Projections._fields)
_SIGNATURE = (
    "Tensor features, Tensor queries, Tensor? allowed, Tensor? mask_features, Tensor? position, Tensor? query_position,"
    f" {_PARAMETERS}, Tensor? scale"
)
_PARTS = slice(6, 6 + len(Projections._fields))
"""The parameters among the tensors of a call, in the order of the schema."""


def _attend(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    features, queries, allowed, mask_features, position, query_position = arguments[: _PARTS.start]
    scale, selection, residual, backend = arguments[_PARTS.stop :]
    chosen, _ = choose_backend("emca_attention", features, queries, allowed, mask_features, arguments[_PARTS.start], asked=backend)
    mask = from_parts(allowed, mask_features, features.shape[1])
    attended = chosen.implementation(
        features,
        queries,
        mask if chosen.reads_masks else allowed_of(mask),
        position,
        query_position,
        Projections(*arguments[_PARTS]),
        scale,
        selection=selection,
        residual=residual,
    )
    updated, rows, kept = attended
    return updated.contiguous(), rows.contiguous(), kept.contiguous()


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    features, queries, selection = arguments[0], arguments[1], arguments[_PARTS.stop + 1]
    kept = torch.int64 if selection == "argmax" else torch.promote_types(features.dtype, torch.float32)
    return queries.new_empty(queries.shape), queries.new_empty(queries.shape), queries.new_empty(queries.shape[:2], dtype=kept)


def _flops(*shapes: Any, **_: Any) -> int:
    (batch, pixels, width), (_, queries, _), _, mask_features = shapes[:4]
    selection, keys = shapes[_PARTS.stop + 1], shapes[_PARTS.start][0]
    products = {"argmax": 1, "softmax": 2, "mean": 1}[selection] * width + (mask_features[2] if mask_features is not None else 0)
    # query, fold, key, out; the product is D by D
    projections = (3 if selection == "mean" else 4) * width * keys + keys * keys
    return 2 * batch * queries * (pixels * products + projections)


def _backward(gradient: Tensor, rows: Tensor, kept: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    features, queries, allowed, mask_features, position, query_position = arguments[: _PARTS.start]
    scale, selection, residual = arguments[_PARTS.stop :]
    *of_inputs, of_scale, of_parameters = backward(
        gradient,
        features,
        queries,
        allowed_of(from_parts(allowed, mask_features, features.shape[1])),
        position,
        query_position,
        Projections(*arguments[_PARTS]),
        scale,
        Attended(gradient, rows, kept),
        selection=selection,
        residual=residual,
    )
    return (*of_inputs, *of_parameters, features.new_zeros(()) if of_scale is None else of_scale)


def _backward_fake(gradient: Tensor, rows: Tensor, kept: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    features, queries, scale = arguments[0], arguments[1], arguments[_PARTS.stop]
    like = [features, queries, *arguments[_PARTS], features.new_empty(()) if scale is None else scale]
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in like)


def _backward_flops(gradient: Any, rows: Any, kept: Any, *shapes: Any, **_: Any) -> int:
    (batch, pixels, width), (_, queries, _) = shapes[:2]
    selection, keys = shapes[_PARTS.stop + 1], shapes[_PARTS.start][0]
    pooled = {"argmax": 0, "softmax": 5, "mean": 1}[selection] * pixels * width
    # recomputed: query, key, product (and fold); two gradients for each of query, key, product and out (and fold)
    projections = (11 if selection == "softmax" else 8) * width * keys + 3 * keys * keys
    shared = queries * width if selection == "argmax" else 0
    return 2 * batch * queries * (pooled + projections + shared)


_operator = register_operator(
    f"emca_attention({_SIGNATURE}, str selection, str residual, str? backend) -> (Tensor, Tensor, Tensor)",
    _attend,
    fake=_fake,
    flops=_flops,
)
_backward_operator = register_operator(
    f"emca_attention_backward(Tensor gradient, Tensor rows, Tensor kept, {_SIGNATURE}, str selection, str residual) -> "
    f"({', '.join(['Tensor'] * (3 + len(Projections._fields)))})",
    _backward,
    fake=_backward_fake,
    flops=_backward_flops,
)


class _EmcaAttention(torch.autograd.Function):
    """Keeps the inputs, a row and a number per query; the backward pass recomputes the rest."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        updated, rows, kept = _operator(*arguments)
        *tensors, ctx.selection, ctx.residual, _ = arguments
        ctx.save_for_backward(rows, kept, *tensors)
        return updated

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, kept, *tensors = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        of_features, of_located, *of_others = _backward_operator(gradient, rows, kept, *tensors, ctx.selection, ctx.residual)
        of_queries = of_located + gradient if ctx.residual == "raw" else of_located
        found = (of_features, of_queries, None, None, of_features, of_located, *of_others, None, None, None)
        return tuple(tensor if needed else None for tensor, needed in zip(found, ctx.needs_input_grad, strict=True))


def emca_attention(
    features: Tensor,
    queries: Tensor,
    allowed: Tensor | Mask | None,
    projections: Projections,
    *,
    position: Tensor | None = None,
    query_position: Tensor | None = None,
    scale: Tensor | None = None,
    selection: str = "argmax",
    residual: str = "projected",
    backend: str | None = None,
) -> Tensor:
    """One EMCA layer with one head, from features and queries to updated queries, residual included.

    The queries are projected (`Qp`) and folded (`Qp W_K`); they choose or pool their prototypes among the raw features. These are then
    projected, and the queries attend to them element by element. A query with no allowed pixel looks everywhere. Of equal scores the
    lowest pixel wins. The gradient goes through the gathered rows; with "softmax" through the weights too.

    Source: EMCA, all equations (SPEC sections 1 and 3: R1, R3, R4, R6).

    Args:
        features: [B, P, C] pixel features of one level, floating point, any strides.
        queries: [B, Q, C] same dtype and device.
        allowed: bool [B, Q, P], True where the query may look, or another mask of `emca_kernels.masks`; None allows everything.
        projections: the layer's parameters; D = C where the residual is projected.
        position: [P, C] or [B, P, C], B may be 1: added to the features, which the fast backends never write.
        query_position: [Q, C] or [B, Q, C], B may be 1: added to the queries in front of their projection.
        scale: one number as a tensor, multiplies the scores of "softmax"; None is 1.
        selection: "argmax", "softmax" or "mean" of the allowed pixels.
        residual: "projected" adds `Qp`, "raw" adds the queries.
        backend: a backend's name, for tests and measurements.

    Returns:
        [B, Q, C].

    Raises:
        TypeError, ValueError: naming the argument, what was found and what was expected.
    """
    features, queries, position, query_position, scale, *parameters = follow_autocast(
        features, queries, position, query_position, scale, *projections
    )
    mask = as_mask(allowed)
    _check(features, queries, mask, position, query_position, scale, selection, residual, *parameters)
    position, query_position = as_large(position, features), as_large(query_position, queries)
    if is_traced(backend):
        given = (features, queries, allowed_of(mask), position, query_position, Projections(*parameters), scale)
        return reference.emca_attention(*given, selection=selection, residual=residual).queries_BQC
    arguments = (features, queries, *parts_of(mask), position, query_position, *parameters, scale, selection, residual, backend)
    differentiable = (features, queries, position, query_position, *parameters, scale)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in differentiable):
        return _EmcaAttention.apply(*arguments)
    return _operator(*arguments)[0]


@once_per_signature
def _check(
    features: Tensor,
    queries: Tensor,
    mask: Mask | None,
    position: Tensor | None,
    query_position: Tensor | None,
    scale: Tensor | None,
    selection: str,
    residual: str,
    *parameters: Tensor,
) -> None:
    sizes: dict[str, int] = {}
    check_tensor("features", features, ("B", "P", "C"), sizes)
    check_tensor("queries", queries, ("B", "Q", "C"), sizes)
    check_same("features", features, "queries", queries)
    if not 1 <= sizes["P"] < MAX_PIXELS:
        raise ValueError(f"features has P={sizes['P']} pixels, expected at least one and fewer than {MAX_PIXELS}")
    check_tensor("query_weight", parameters[0], ("D", "C"), sizes)
    sizes["E"] = sizes["D"]
    shapes = {"DC": ("D", "C"), "DD": ("E", "D"), "CD": ("C", "D"), "D": ("D",), "C": ("C",)}
    for field, parameter in zip(Projections._fields, parameters, strict=True):
        name, _, dims = field.rpartition("_")
        check_tensor(name, parameter, shapes[dims], sizes)
        check_same("features", features, name, parameter)
    for name, value, known in (("selection", selection, SELECTIONS), ("residual", residual, RESIDUALS)):
        if value not in known:
            raise ValueError(f"{name}={value!r}, expected one of {', '.join(known)}")
    if residual == "projected" and sizes["D"] != sizes["C"]:
        raise ValueError(f"residual='projected' adds D={sizes['D']} channels to C={sizes['C']}, expected D = C")
    if scale is not None:
        check_same("features", features, "scale", scale)
        if selection != "softmax" or scale.numel() != 1:
            raise ValueError(f"scale of shape {list(scale.shape)} with selection={selection!r}, expected one number with 'softmax'")
    check_mask(mask, sizes)
    if mask is None and selection == "mean":
        raise ValueError("selection='mean' needs allowed: without a mask every query would get the same prototype")
    check_position(position, features)
    check_position(query_position, queries, "query_position", "queries")
