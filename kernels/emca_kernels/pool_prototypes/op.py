"""The operator `pool_prototypes`: checks, backend, call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emca_kernels.autocast import follow_autocast
from emca_kernels.backends import Backend, choose_backend, is_traced, register_backend, serves_all
from emca_kernels.checks import as_large, as_mask, check_divides, check_mask, check_position, check_same, check_tensor, once_per_signature
from emca_kernels.masks import Mask, allowed_of, from_parts, parts_of
from emca_kernels.native import library
from emca_kernels.pool_prototypes import native, reference
from emca_kernels.pool_prototypes.backward import backward
from emca_kernels.registration import register_operator
from emca_kernels.triton import runtime

register_backend("pool_prototypes", Backend("reference", reference.pool_prototypes, serves_all))
register_backend("pool_prototypes", Backend("native", native.pool_prototypes, library.refuses))
register_backend(
    "pool_prototypes",
    Backend(
        "triton",
        runtime.lazily("emca_kernels.pool_prototypes.triton_kernels", "pool_prototypes"),
        runtime.refuses,
        runtime.refuses_unasked,
        reads_masks=True,
    ),
)


def _pool(
    features: Tensor,
    queries: Tensor | None,
    allowed: Tensor | None,
    mask_features: Tensor | None,
    position: Tensor | None,
    heads: int,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    chosen, _ = choose_backend("pool_prototypes", features, queries, allowed, mask_features, asked=backend)
    mask = from_parts(allowed, mask_features, features.shape[1])
    # a copy where an implementation hands over a view: an operator's results own their memory
    pooled, logsumexp = chosen.implementation(features, queries, mask if chosen.reads_masks else allowed_of(mask), position, heads=heads)
    return pooled.contiguous(), logsumexp.contiguous()


def _fake(
    features: Tensor,
    queries: Tensor | None,
    allowed: Tensor | None,
    mask_features: Tensor | None,
    position: Tensor | None,
    heads: int,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    asked = queries if queries is not None else allowed
    assert asked is not None
    shape = (*asked.shape[:2], heads)
    exact = torch.promote_types(features.dtype, torch.float32)
    return features.new_empty((*shape, features.shape[2] // heads)), features.new_empty(shape, dtype=exact)


def _flops(features: Any, queries: Any, allowed: Any, mask_features: Any, *_: Any, **__: Any) -> int:
    batch, pixels, width = features
    count = queries[1] if queries is not None else allowed[1]
    logits = 2 * mask_features[2] if mask_features is not None else 0
    return batch * pixels * count * ((4 if queries is not None else 2) * width + logits)


def _backward_fake(gradient: Tensor, features: Tensor, queries: Tensor | None, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(features, memory_format=torch.contiguous_format), features.new_empty(() if queries is None else queries.shape)


def _backward_flops(gradient: Any, features: Any, queries: Any, *_: Any, **__: Any) -> int:
    batch, pixels, width = features
    return (10 if queries is not None else 2) * batch * pixels * gradient[1] * width


_operator = register_operator(
    "pool_prototypes(Tensor features, Tensor? queries, Tensor? allowed, Tensor? mask_features, Tensor? position, int heads, str? backend)"
    " -> (Tensor, Tensor)",
    _pool,
    fake=_fake,
    flops=_flops,
)
_backward_operator = register_operator(
    "pool_prototypes_backward(Tensor gradient, Tensor features, Tensor? queries, Tensor? allowed, Tensor? position, Tensor pooled,"
    " Tensor logsumexp) -> (Tensor, Tensor)",
    backward,
    fake=_backward_fake,
    flops=_backward_flops,
)


class _PoolPrototypes(torch.autograd.Function):
    """Keeps the inputs, the result and a number per query and head; the backward pass recomputes the weights."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        queries: Tensor | None,
        allowed: Tensor | None,
        mask_features: Tensor | None,
        position: Tensor | None,
        heads: int,
        backend: str | None,
    ) -> Tensor:
        pooled, logsumexp = _operator(features, queries, allowed, mask_features, position, heads, backend)
        ctx.save_for_backward(features, queries, allowed, mask_features, position, pooled, logsumexp)
        return pooled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        features, queries, allowed, mask_features, *others = ctx.saved_tensors
        allowed = allowed_of(from_parts(allowed, mask_features, features.shape[1]))
        of_features, of_queries = _backward_operator(gradients[0], features, queries, allowed, *others)
        of_position = of_features if ctx.needs_input_grad[4] else None
        return of_features, of_queries if ctx.needs_input_grad[1] else None, None, None, of_position, None, None


def pool_prototypes(
    features: Tensor,
    queries: Tensor | None,
    allowed: Tensor | Mask | None = None,
    *,
    heads: int = 1,
    position: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Weighted mean of the allowed pixels' features: softmax of the scores, or equal weights.

    Gradients flow to features and, through the softmax, to queries. A temperature belongs into the queries (scores scale with them).
    A query with no allowed pixel pools everywhere.

    Source: SPEC section 3, R6.

    Args:
        features: [B, P, C] pixel features of one level.
        queries: [B, Q, C], or None for the plain mean of the allowed pixels.
        allowed: bool [B, Q, P], True where the query may look, or another mask of `emca_kernels.masks`; None allows everything, and
            needs queries.
        heads: splits the channels; each head has its own weights. Divides C.
        position: [P, C] or [B, P, C], B may be 1, of the same dtype: added to the features, without the sum ever being written by
            the fast backends.
        backend: a backend's name, for tests and measurements.

    Returns:
        [B, Q, heads, C / heads] pooled features.

    Raises:
        TypeError, ValueError: naming the argument, what was found and what was expected.
    """
    features, queries, position = follow_autocast(features, queries, position)
    mask = as_mask(allowed)
    _check(features, queries, mask, position, heads)
    position = as_large(position, features)
    if is_traced(backend):
        return reference.pool_prototypes(features, queries, allowed_of(mask), position, heads=heads)[0]
    parts = parts_of(mask)
    if not torch.is_grad_enabled() or not any(tensor is not None and tensor.requires_grad for tensor in (features, queries, position)):
        return _operator(features, queries, *parts, position, heads, backend)[0]
    return _PoolPrototypes.apply(features, queries, *parts, position, heads, backend)


@once_per_signature
def _check(features: Tensor, queries: Tensor | None, mask: Mask | None, position: Tensor | None, heads: int) -> None:
    sizes: dict[str, int] = {}
    check_tensor("features", features, ("B", "P", "C"), sizes)
    if queries is not None:
        check_tensor("queries", queries, ("B", "Q", "C"), sizes)
        check_same("features", features, "queries", queries)
    elif mask is None:
        raise ValueError("pool_prototypes needs queries, or allowed, or both: without them there is nothing to pool for")
    check_position(position, features)
    check_mask(mask, sizes)
    check_divides("heads", heads, "C", sizes["C"])
