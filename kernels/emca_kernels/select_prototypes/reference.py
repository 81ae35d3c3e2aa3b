"""Readable definition of prototype selection, in any floating-point dtype: the oracle of every faster backend."""

from __future__ import annotations

import torch
from torch import Tensor

from emca_kernels.masks import allow_everywhere_if_empty


@torch.no_grad()
def select_prototypes(
    features_BPC: Tensor, queries_BQC: Tensor, allowed_BQP: Tensor | None, position_BPC: Tensor | None, *, k: int, heads: int
) -> tuple[Tensor, Tensor]:
    """See `emca_kernels.select_prototypes`."""
    if position_BPC is not None:
        features_BPC = features_BPC + position_BPC
    features_BMCP = features_BPC.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1)
    queries_BMQC = queries_BQC.unflatten(-1, (heads, -1)).transpose(1, 2)
    scores_BMQP = queries_BMQC @ features_BMCP
    if allowed_BQP is not None:
        scores_BMQP = scores_BMQP.masked_fill(~allow_everywhere_if_empty(allowed_BQP)[:, None], -torch.inf)
    if k == 1:
        # max returns the first of equal values
        scores_BMQK, indices_BMQK = scores_BMQP.max(-1, keepdim=True)
    else:
        ordered = scores_BMQP.sort(dim=-1, descending=True, stable=True)
        scores_BMQK, indices_BMQK = ordered.values[..., :k], ordered.indices[..., :k]
        indices_BMQK = torch.where(scores_BMQK == -torch.inf, indices_BMQK[..., :1], indices_BMQK)
    return indices_BMQK.transpose(1, 2), scores_BMQK.transpose(1, 2)
