"""Prototype selection on CPUs: one pass over the pixels, the score matrix is never written."""

from __future__ import annotations

import torch
from torch import Tensor


def select_prototypes(
    features_BPC: Tensor, queries_BQC: Tensor, allowed_BQP: Tensor | None, position_BPC: Tensor | None, *, k: int, heads: int
) -> tuple[Tensor, Tensor]:
    """See `emca_kernels.select_prototypes`; scores are summed in float32."""
    if allowed_BQP is not None and allowed_BQP.stride(-1) != 1:
        allowed_BQP = allowed_BQP.contiguous()
    indices, scores = torch.ops.emca_native.select_prototypes(features_BPC, queries_BQC, allowed_BQP, position_BPC, k, heads)
    return indices, scores.to(features_BPC.dtype)
