"""What every backend of `emca_attention` is given, and what it returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

SELECTIONS = ("argmax", "softmax", "mean")
"""One pixel per query, a softmax over the allowed pixels, or their mean."""
RESIDUALS = ("projected", "raw")


class Projections(NamedTuple):
    """The layer's parameters (SPEC section 1). Weights are stored [out, in]; D is the key width."""

    query_weight_DC: Tensor
    query_bias_D: Tensor
    key_weight_DC: Tensor
    key_bias_D: Tensor
    product_weight_DD: Tensor
    product_bias_D: Tensor
    alpha_D: Tensor
    out_weight_CD: Tensor
    out_bias_C: Tensor


class Attended(NamedTuple):
    """The updated queries, and what a backward pass needs beside the inputs."""

    queries_BQC: Tensor
    rows_BQC: Tensor
    """The prototypes as features, positions added, not projected yet."""
    kept_BQ: Tensor
    """argmax: the chosen pixels, int64. softmax: log of the sum of exponentials; mean: zeros; both in float32 at least."""
