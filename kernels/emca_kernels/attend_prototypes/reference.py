"""Readable definition of the element-wise attention: the oracle of every faster backend. Differentiable by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-12


def attend_prototypes(
    prototypes_BQD: Tensor,
    queries_BQD: Tensor,
    product_weight_DD: Tensor,
    product_bias_D: Tensor,
    alpha_D: Tensor,
    out_weight_CD: Tensor,
    out_bias_C: Tensor,
    *,
    norm_axis: str,
) -> Tensor:
    """See `emca_kernels.attend_prototypes`."""
    product_BQD = F.linear(queries_BQD * prototypes_BQD, product_weight_DD, product_bias_D)
    norm = torch.linalg.vector_norm(product_BQD, dim=-1 if norm_axis == "row" else 1, keepdim=True)
    reweighted_BQD = alpha_D * product_BQD / norm.clamp(min=smallest_norm(norm.dtype)) + prototypes_BQD
    return F.linear(reweighted_BQD, out_weight_CD, out_bias_C)


def smallest_norm(dtype: torch.dtype) -> float:
    """What a norm is clamped to: 1e-12, which is zero in float16."""
    return max(EPSILON, torch.finfo(dtype).tiny)
