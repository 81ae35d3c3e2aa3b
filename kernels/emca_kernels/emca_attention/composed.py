"""The layer as torch's matrix products around the fastest selection or pooling: serves what no backend serves as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from emca_kernels.backends import RefusedError, explain_backend
from emca_kernels.emca_attention.arguments import Attended, Projections
from emca_kernels.emca_attention.reference import attend_around
from emca_kernels.masks import Mask, parts_of


def emca_attention(
    features_BPC: Tensor,
    queries_BQC: Tensor,
    mask: Mask | None,
    position_BPC: Tensor | None,
    query_position_BQC: Tensor | None,
    projections: Projections,
    scale: Tensor | None,
    *,
    selection: str,
    residual: str,
) -> Attended:
    """See `emca_kernels.emca_attention`."""
    parts = (*parts_of(mask), position_BPC)

    def select(queries_BQC: Tensor) -> Tensor:
        return torch.ops.emca.select_prototypes(features_BPC, queries_BQC, *parts, 1, 1, None)[0]

    def pool(queries_BQC: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.ops.emca.pool_prototypes(features_BPC, queries_BQC, *parts, 1, None)

    return attend_around(select, pool, features_BPC, queries_BQC, position_BPC, query_position_BQC, projections, scale, selection, residual)


def refuses(
    features: Tensor, queries: Tensor, allowed: Tensor | None = None, mask_features: Tensor | None = None, *_: Tensor
) -> str | None:
    """That there is nothing faster to compose than the reference's own parts, or None."""
    try:
        names = {explain_backend(op, features, queries, allowed, mask_features)[0] for op in ("select_prototypes", "pool_prototypes")}
    except RefusedError as error:
        return str(error)
    return "its parts would be the reference's" if names == {"reference"} else None
