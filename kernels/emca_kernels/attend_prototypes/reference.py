"""Readable definition of the element-wise attention: the oracle of every faster backend. Differentiable by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-12


def attend_prototypes(
    prototypes_BQD: Tensor,
    queries_BQD: Tensor,
    product_weight_DD: Tensor | None,
    product_bias_D: Tensor | None,
    alpha_D: Tensor,
    out_weight_CD: Tensor,
    out_bias_C: Tensor,
    *,
    norm_axis: str,
) -> Tensor:
    """See `emca_kernels.attend_prototypes`."""
    product_BQD = queries_BQD * prototypes_BQD
    if product_weight_DD is not None:
        product_BQD = F.linear(product_BQD, product_weight_DD, product_bias_D)
    weighted_BQD = alpha_D * product_BQD
    if norm_axis != "none":
        norm = torch.linalg.vector_norm(product_BQD, dim=-1 if norm_axis == "row" else 1, keepdim=True)
        weighted_BQD = weighted_BQD / norm.clamp(min=smallest_norm(norm.dtype))
    return F.linear(weighted_BQD + prototypes_BQD, out_weight_CD, out_bias_C)


def smallest_norm(dtype: torch.dtype) -> float:
    """What a norm is clamped to: 1e-12, which is zero in float16."""
    return max(EPSILON, torch.finfo(dtype).tiny)
