"""Gradients of the layer: everything of size [Q, C] is recomputed, nothing of size [P, C] is kept but the features themselves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from emca_kernels.attend_prototypes.reference import smallest_norm
from emca_kernels.emca_attention.arguments import Attended, Projections
from emca_kernels.emca_attention.reference import located
from emca_kernels.pool_prototypes.backward import backward as pool_backward


def backward(
    gradient_BQC: Tensor,
    features_BPC: Tensor,
    queries_BQC: Tensor,
    allowed_BQP: Tensor | None,
    position_BPC: Tensor | None,
    query_position_BQC: Tensor | None,
    projections: Projections,
    scale: Tensor | None,
    attended: Attended,
    *,
    selection: str,
    residual: str,
) -> tuple[Tensor, Tensor, Tensor | None, Projections]:
    """Gradients of features, of queries in front of their projection, of scale and of the parameters.

    That of the pixels' positions is that of the features. A raw residual's own part is the caller's to add.
    """
    weights, rows_BQC = projections, attended.rows_BQC
    located_BQC = located(queries_BQC, query_position_BQC)
    projected_BQD = F.linear(located_BQC, weights.query_weight_DC, weights.query_bias_D)
    prototypes_BQD = F.linear(rows_BQC, weights.key_weight_DC, weights.key_bias_D)
    of_reweighted_BQD = gradient_BQC @ weights.out_weight_CD
    unit_BQD, of_product_BQD = through_norm(
        F.linear(projected_BQD * prototypes_BQD, weights.product_weight_DD, weights.product_bias_D), weights.alpha_D * of_reweighted_BQD
    )
    of_pairs_BQD = of_product_BQD @ weights.product_weight_DD
    of_prototypes_BQD = of_reweighted_BQD + of_pairs_BQD * projected_BQD
    of_projected_BQD = of_pairs_BQD * prototypes_BQD
    if residual == "projected":
        of_projected_BQD = of_projected_BQD + gradient_BQC
    of_rows_BQC = of_prototypes_BQD @ weights.key_weight_DC
    of_key_weight_DC = outer(of_prototypes_BQD, rows_BQC)

    of_scale: Tensor | None = None
    if selection == "argmax":
        of_features_BPC = scatter_rows(of_rows_BQC, attended.kept_BQ, features_BPC)
    else:
        folded_BQC = projected_BQD @ weights.key_weight_DC
        asked_BQC = None if selection == "mean" else folded_BQC if scale is None else folded_BQC * scale
        of_features_BPC, of_asked_BQC = pool_backward(
            of_rows_BQC[:, :, None], features_BPC, asked_BQC, allowed_BQP, position_BPC, rows_BQC[:, :, None], attended.kept_BQ[..., None]
        )
        if asked_BQC is not None:
            of_folded_BQC = of_asked_BQC if scale is None else of_asked_BQC * scale
            of_scale = None if scale is None else (of_asked_BQC * folded_BQC).sum().view_as(scale)
            of_projected_BQD = of_projected_BQD + of_folded_BQC @ weights.key_weight_DC.mT
            of_key_weight_DC = of_key_weight_DC + outer(projected_BQD, of_folded_BQC)
    of_located_BQC = of_projected_BQD @ weights.query_weight_DC
    of_weights = Projections(
        query_weight_DC=outer(of_projected_BQD, located_BQC),
        query_bias_D=of_projected_BQD.sum((0, 1)),
        key_weight_DC=of_key_weight_DC,
        key_bias_D=of_prototypes_BQD.sum((0, 1)),
        product_weight_DD=outer(of_product_BQD, projected_BQD * prototypes_BQD),
        product_bias_D=of_product_BQD.sum((0, 1)),
        alpha_D=(of_reweighted_BQD * unit_BQD).sum((0, 1)),
        out_weight_CD=outer(gradient_BQC, weights.alpha_D * unit_BQD + prototypes_BQD),
        out_bias_C=gradient_BQC.sum((0, 1)),
    )
    return of_features_BPC, of_located_BQC, of_scale, of_weights


def through_norm(product_BQD: Tensor, of_unit_BQD: Tensor) -> tuple[Tensor, Tensor]:
    """A product over its norm, and the gradient of the product."""
    norm_BQ1 = torch.linalg.vector_norm(product_BQD, dim=-1, keepdim=True)
    smallest = smallest_norm(norm_BQ1.dtype)
    divisor_BQ1 = norm_BQ1.clamp(min=smallest)
    unit_BQD = product_BQD / divisor_BQ1
    # a clamped norm is a constant
    along_BQ1 = (of_unit_BQD * unit_BQD).sum(-1, keepdim=True).masked_fill(norm_BQ1 < smallest, 0.0)
    return unit_BQD, (of_unit_BQD - unit_BQD * along_BQ1) / divisor_BQ1


def outer(gradient_BQO: Tensor, inputs_BQI: Tensor) -> Tensor:
    """The gradient of a weight [O, I]: over all queries of all images."""
    return gradient_BQO.flatten(0, 1).mT @ inputs_BQI.flatten(0, 1)


def scatter_rows(rows_BQC: Tensor, indices_BQ: Tensor, features_BPC: Tensor) -> Tensor:
    """Zeros like the features, plus each query's row at its pixel.

    Rows that share a pixel are summed first, in a fixed order, and each of them writes the sum: no order of writing changes a bit.
    """
    shared_BQQ = (indices_BQ[:, :, None] == indices_BQ[:, None, :]).to(rows_BQC.dtype)
    target = torch.zeros_like(features_BPC, dtype=rows_BQC.dtype, memory_format=torch.contiguous_format)
    return target.scatter_(1, indices_BQ[..., None].expand_as(rows_BQC), shared_BQQ @ rows_BQC)
