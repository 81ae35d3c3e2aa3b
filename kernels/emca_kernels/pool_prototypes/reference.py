"""Readable definition of soft prototypes, in any floating-point dtype: the oracle of every faster backend."""

from __future__ import annotations

import torch
from torch import Tensor

from emca_kernels.masks import allow_everywhere_if_empty


def pool_prototypes(
    features_BPC: Tensor, queries_BQC: Tensor | None, allowed_BQP: Tensor | None, position_BPC: Tensor | None, *, heads: int
) -> tuple[Tensor, Tensor]:
    """Pooled features and their logsumexp, see `emca_kernels.pool_prototypes.op`."""
    if position_BPC is not None:
        features_BPC = features_BPC + position_BPC
    if allowed_BQP is not None:
        allowed_BQP = allow_everywhere_if_empty(allowed_BQP)
    features_BMPC = features_BPC.unflatten(-1, (heads, -1)).transpose(1, 2)
    if queries_BQC is None:
        assert allowed_BQP is not None
        # divided first: in float16 the sum over all pixels may overflow
        count_BQ1 = allowed_BQP.sum(-1, keepdim=True).to(torch.promote_types(features_BPC.dtype, torch.float32))
        weights_BMQP = (allowed_BQP * count_BQ1.reciprocal().to(features_BPC.dtype))[:, None]
        logsumexp_BMQ = count_BQ1.new_zeros(*features_BMPC.shape[:2], allowed_BQP.shape[1])
    else:
        queries_BMQC = queries_BQC.unflatten(-1, (heads, -1)).transpose(1, 2)
        scores_BMQP = queries_BMQC @ features_BMPC.mT
        if allowed_BQP is not None:
            scores_BMQP = scores_BMQP.masked_fill(~allowed_BQP[:, None], -torch.inf)
        weights_BMQP = scores_BMQP.softmax(-1)
        logsumexp_BMQ = scores_BMQP.to(torch.promote_types(scores_BMQP.dtype, torch.float32)).logsumexp(-1)
    return (weights_BMQP @ features_BMPC).transpose(1, 2), logsumexp_BMQ.transpose(1, 2)
