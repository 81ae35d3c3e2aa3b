"""Soft prototypes on CPUs: one pass over the pixels with a running maximum and sum, weights are never written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emca_kernels.pool_prototypes.backward import backward


def pool_prototypes(
    features_BPC: Tensor, queries_BQC: Tensor | None, allowed_BQP: Tensor | None, position_BPC: Tensor | None, *, heads: int
) -> Tensor:
    """See `emca_kernels.pool_prototypes`; scores and sums are float32."""
    if allowed_BQP is not None and allowed_BQP.stride(-1) != 1:
        allowed_BQP = allowed_BQP.contiguous()
    return _PoolPrototypes.apply(features_BPC, queries_BQC, allowed_BQP, position_BPC, heads)


class _PoolPrototypes(torch.autograd.Function):
    """Keeps the inputs, the result and a number per query and head; the backward pass recomputes the weights."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, queries: Tensor | None, allowed: Tensor | None, position: Tensor | None, heads: int) -> Tensor:
        pooled, logsumexp = torch.ops.emca_native.pool_prototypes(features, queries, allowed, position, heads)
        ctx.save_for_backward(features, queries, allowed, position, pooled, logsumexp)
        return pooled.to(features.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        features, queries, allowed, position, pooled, logsumexp = ctx.saved_tensors
        of_features, of_queries = backward(gradients[0], features, queries, allowed, position, pooled, logsumexp)
        of_position = of_features.sum_to_size(position.shape) if position is not None and ctx.needs_input_grad[3] else None
        return of_features, of_queries, None, of_position, None
