"""The operator `pool_prototypes`: checks, backend, call."""

from __future__ import annotations

import torch
from torch import Tensor

from emca_kernels.autocast import follow_autocast
from emca_kernels.backends import Backend, choose_backend, register_backend, serves_all
from emca_kernels.checks import check_allowed, check_divides, check_same, check_tensor
from emca_kernels.pool_prototypes import reference

register_backend("pool_prototypes", Backend("reference", reference.pool_prototypes, serves_all))


def pool_prototypes(
    features: Tensor, queries: Tensor | None, allowed: Tensor | None = None, *, heads: int = 1, backend: str | None = None
) -> Tensor:
    """Weighted mean of the allowed pixels' features: softmax of the scores, or equal weights.

    Gradients flow to features and, through the softmax, to queries. A temperature belongs into the queries (scores scale with them).
    A query with no allowed pixel pools everywhere.

    Source: SPEC section 3, R6.

    Args:
        features: [B, P, C] pixel features of one level.
        queries: [B, Q, C], or None for the plain mean of the allowed pixels.
        allowed: bool [B, Q, P], True where the query may look; None allows everything, and needs queries.
        heads: splits the channels; each head has its own weights. Divides C.
        backend: a backend's name, for tests and measurements.

    Returns:
        [B, Q, heads, C / heads] pooled features.

    Raises:
        TypeError, ValueError: naming the argument, what was found and what was expected.
    """
    sizes: dict[str, int] = {}
    check_tensor("features", features, ("B", "P", "C"), sizes)
    if queries is not None:
        check_tensor("queries", queries, ("B", "Q", "C"), sizes)
        features, queries = follow_autocast(features, queries)
        check_same("features", features, "queries", queries)
        if allowed is None:
            allowed = torch.ones((), dtype=torch.bool, device=features.device).expand(sizes["B"], sizes["Q"], sizes["P"])
    elif allowed is None:
        raise ValueError("pool_prototypes needs queries, or allowed, or both: without them there is nothing to pool for")
    check_allowed(allowed, sizes)
    check_divides("heads", heads, "C", sizes["C"])
    chosen, _ = choose_backend("pool_prototypes", features, queries, allowed, asked=backend)
    return chosen.implementation(features, queries, allowed, heads=heads)
