"""Gradients of soft prototypes, tile by tile: weights are recomputed from their saved normaliser, as in flash attention."""

from __future__ import annotations

import torch
from torch import Tensor

from emca_kernels.masks import allow_everywhere_if_empty

TILE_PIXELS = 2048
"""Pixels whose weights [B, M, Q, tile] are held at a time."""


def backward(
    gradient_BQMd: Tensor,
    features_BPC: Tensor,
    queries_BQC: Tensor | None,
    allowed_BQP: Tensor | None,
    position_BPC: Tensor | None,
    pooled_BQMd: Tensor,
    logsumexp_BQM: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of features and queries (a lone number without queries), in their dtypes; all sums are float32 at least.

    With weights w = exp(q x - logsumexp), y = sum_p w_p x_p and its gradient g: dx_p = w_p g + ds_p q and dq = sum_p ds_p x_p, where
    ds_p = w_p (g x_p - g y).
    """
    exact = torch.promote_types(features_BPC.dtype, torch.float32)
    heads = gradient_BQMd.shape[2]
    gradient_BMQd = gradient_BQMd.transpose(1, 2).to(exact)
    of_features_BPC = torch.empty_like(features_BPC, memory_format=torch.contiguous_format)
    if allowed_BQP is not None:
        allowed_BQP = allow_everywhere_if_empty(allowed_BQP)
    if queries_BQC is None:
        assert allowed_BQP is not None
        share_BQ1 = allowed_BQP.sum(-1, keepdim=True).to(exact).reciprocal()
    else:
        queries_BMQd = queries_BQC.unflatten(-1, (heads, -1)).transpose(1, 2).to(exact)
        normaliser_BMQ1 = logsumexp_BQM.transpose(1, 2)[..., None].to(exact)
        inner_BMQ1 = (gradient_BMQd * pooled_BQMd.transpose(1, 2)).sum(-1, keepdim=True)
        of_queries_BMQd = torch.zeros_like(queries_BMQd)
    for start in range(0, features_BPC.shape[1], TILE_PIXELS):
        tile = slice(start, start + TILE_PIXELS)
        rows_BpC = features_BPC[:, tile] if position_BPC is None else features_BPC[:, tile] + position_BPC[:, tile]
        rows_BMpd = rows_BpC.unflatten(-1, (heads, -1)).transpose(1, 2).to(exact)
        if queries_BQC is None:
            assert allowed_BQP is not None
            weights_BMQp = (allowed_BQP[:, :, tile] * share_BQ1)[:, None].to(exact)
            of_rows_BMpd = weights_BMQp.mT @ gradient_BMQd
        else:
            weights_BMQp = (queries_BMQd @ rows_BMpd.mT - normaliser_BMQ1).exp()
            if allowed_BQP is not None:
                weights_BMQp = weights_BMQp.masked_fill(~allowed_BQP[:, None, :, tile], 0.0)
            of_scores_BMQp = weights_BMQp * (gradient_BMQd @ rows_BMpd.mT - inner_BMQ1)
            of_rows_BMpd = weights_BMQp.mT @ gradient_BMQd + of_scores_BMQp.mT @ queries_BMQd
            of_queries_BMQd += of_scores_BMQp @ rows_BMpd
        of_features_BPC[:, tile] = of_rows_BMpd.transpose(1, 2).flatten(2)
    if queries_BQC is None:
        return of_features_BPC, of_features_BPC.new_zeros(())
    return of_features_BPC, of_queries_BMQd.transpose(1, 2).flatten(2).to(queries_BQC.dtype)
