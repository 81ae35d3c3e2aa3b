"""The whole layer on CPUs: one call, three parallel regions, nothing of the size of the pixels is written."""

from __future__ import annotations

import torch
from torch import Tensor

from emca_kernels.emca_attention.arguments import Attended, Projections


def emca_attention(
    features_BPC: Tensor,
    queries_BQC: Tensor,
    allowed_BQP: Tensor | None,
    position_BPC: Tensor | None,
    query_position_BQC: Tensor | None,
    projections: Projections,
    scale: Tensor | None,
    *,
    selection: str,
    residual: str,
) -> Attended:
    """See `emca_kernels.emca_attention`; everything is summed in float32."""
    if allowed_BQP is not None and allowed_BQP.stride(-1) != 1:
        allowed_BQP = allowed_BQP.contiguous()
    updated, rows, kept = torch.ops.emca_native.emca_attention(
        features_BPC, queries_BQC, allowed_BQP, position_BPC, query_position_BQC, list(projections), scale, selection, residual
    )
    dtype = features_BPC.dtype
    return Attended(updated.to(dtype), rows.to(dtype), kept)
