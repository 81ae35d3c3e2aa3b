"""Soft prototypes on CPUs: one pass over the pixels with a running maximum and sum, weights are never written."""

from __future__ import annotations

import torch
from torch import Tensor


def pool_prototypes(
    features_BPC: Tensor, queries_BQC: Tensor | None, allowed_BQP: Tensor | None, position_BPC: Tensor | None, *, heads: int
) -> tuple[Tensor, Tensor]:
    """See `emca_kernels.pool_prototypes.op`; scores and sums are float32."""
    if allowed_BQP is not None and allowed_BQP.stride(-1) != 1:
        allowed_BQP = allowed_BQP.contiguous()
    pooled, logsumexp = torch.ops.emca_native.pool_prototypes(features_BPC, queries_BQC, allowed_BQP, position_BPC, heads)
    return pooled.to(features_BPC.dtype), logsumexp
