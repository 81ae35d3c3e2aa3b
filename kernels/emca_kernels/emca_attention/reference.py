"""Readable definition of the layer, in any floating-point dtype: the oracle of every faster backend."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from emca_kernels.attend_prototypes.reference import attend_prototypes
from emca_kernels.emca_attention.arguments import Attended, Projections
from emca_kernels.pool_prototypes.reference import pool_prototypes
from emca_kernels.select_prototypes.reference import select_prototypes


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
    """See `emca_kernels.emca_attention`."""
    weights = projections
    projected_BQD = F.linear(located(queries_BQC, query_position_BQC), weights.query_weight_DC, weights.query_bias_D)
    folded_BQC = projected_BQD @ weights.key_weight_DC
    if selection == "argmax":
        indices, _ = select_prototypes(features_BPC, folded_BQC, allowed_BQP, position_BPC, k=1, heads=1)
        kept_BQ = indices[:, :, 0, 0]
        rows_BQC = rows_at(features_BPC, kept_BQ)
        if position_BPC is not None:
            rows_BQC = rows_BQC + rows_at(position_BPC, kept_BQ)
    else:
        asked_BQC = None if selection == "mean" else folded_BQC if scale is None else folded_BQC * scale
        pooled, logsumexp = pool_prototypes(features_BPC, asked_BQC, allowed_BQP, position_BPC, heads=1)
        rows_BQC, kept_BQ = pooled[:, :, 0], logsumexp[:, :, 0]
    update_BQC = attend_prototypes(
        F.linear(rows_BQC, weights.key_weight_DC, weights.key_bias_D),
        projected_BQD,
        weights.product_weight_DD,
        weights.product_bias_D,
        weights.alpha_D,
        weights.out_weight_CD,
        weights.out_bias_C,
        norm_axis="row",
    )
    return Attended(update_BQC + (projected_BQD if residual == "projected" else queries_BQC), rows_BQC, kept_BQ)


def located(content_BQC: Tensor, position_BQC: Tensor | None) -> Tensor:
    """Content plus its position, where it has one."""
    return content_BQC if position_BQC is None else content_BQC + position_BQC


def rows_at(rows_BPC: Tensor, indices_BQ: Tensor) -> Tensor:
    """The rows of the chosen pixels, [B, Q, C]."""
    return rows_BPC.gather(1, indices_BQ[..., None].expand(-1, -1, rows_BPC.shape[-1]))
