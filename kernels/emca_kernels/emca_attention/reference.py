"""Readable definition of the layer, in any floating-point dtype: the oracle of every faster backend."""

from __future__ import annotations

from collections.abc import Callable

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

    def select(queries_BQC: Tensor) -> Tensor:
        return select_prototypes(features_BPC, queries_BQC, allowed_BQP, position_BPC, k=1, heads=1)[0]

    def pool(queries_BQC: Tensor | None) -> tuple[Tensor, Tensor]:
        return pool_prototypes(features_BPC, queries_BQC, allowed_BQP, position_BPC, heads=1)

    return attend_around(select, pool, features_BPC, queries_BQC, position_BPC, query_position_BQC, projections, scale, selection, residual)


def attend_around(
    select: Callable[[Tensor], Tensor],
    pool: Callable[[Tensor | None], tuple[Tensor, Tensor]],
    features_BPC: Tensor,
    queries_BQC: Tensor,
    position_BPC: Tensor | None,
    query_position_BQC: Tensor | None,
    projections: Projections,
    scale: Tensor | None,
    selection: str,
    residual: str,
) -> Attended:
    """The layer around a search for one pixel (indices [B, Q, 1, 1]) or around a weighted mean of pixels ([B, Q, 1, C] and [B, Q, 1])."""
    projected_BQD, folded_BQC = project(queries_BQC, query_position_BQC, projections)
    if selection == "argmax":
        kept_BQ = select(folded_BQC)[:, :, 0, 0]
        rows_BQC = rows_at(features_BPC, position_BPC, kept_BQ)
    else:
        pooled, logsumexp = pool(None if selection == "mean" else folded_BQC if scale is None else folded_BQC * scale)
        rows_BQC, kept_BQ = pooled[:, :, 0], logsumexp[:, :, 0]
    return finish(rows_BQC, kept_BQ, projected_BQD, queries_BQC, projections, residual)


def project(queries_BQC: Tensor, query_position_BQC: Tensor | None, projections: Projections) -> tuple[Tensor, Tensor]:
    """The projected queries, and these folded (SPEC section 3, R1)."""
    projected_BQD = F.linear(located(queries_BQC, query_position_BQC), projections.query_weight_DC, projections.query_bias_D)
    return projected_BQD, projected_BQD @ projections.key_weight_DC


def finish(
    rows_BQC: Tensor, kept_BQ: Tensor, projected_BQD: Tensor, queries_BQC: Tensor, projections: Projections, residual: str
) -> Attended:
    """From the prototypes as features to the updated queries."""
    weights = projections
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


def rows_at(features_BPC: Tensor, position_BPC: Tensor | None, indices_BQ: Tensor) -> Tensor:
    """The rows of the chosen pixels with their positions, [B, Q, C]."""
    indices_BQC = indices_BQ[..., None].expand(-1, -1, features_BPC.shape[-1])
    return located(features_BPC.gather(1, indices_BQC), None if position_BPC is None else position_BPC.gather(1, indices_BQC))
