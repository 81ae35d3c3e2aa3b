"""The operator `pool_prototypes`: checks, backend, call."""

from __future__ import annotations

from torch import Tensor

from emca_kernels.backends import Backend, choose_backend, register_backend, serves_all
from emca_kernels.checks import check_allowed, check_divides, check_position, check_same, check_tensor, join_autocast
from emca_kernels.native import library
from emca_kernels.pool_prototypes import native, reference

register_backend("pool_prototypes", Backend("reference", reference.pool_prototypes, serves_all))
register_backend("pool_prototypes", Backend("native", native.pool_prototypes, library.refuses))


def pool_prototypes(
    features: Tensor,
    queries: Tensor | None,
    allowed: Tensor | None = None,
    *,
    heads: int = 1,
    position: Tensor | None = None,
    backend: str | None = None,
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
        position: [P, C] or [B, P, C], B may be 1, of the same dtype: added to the features, without the sum ever being written by
            the fast backends.
        backend: a backend's name, for tests and measurements.

    Returns:
        [B, Q, heads, C / heads] pooled features.

    Raises:
        TypeError, ValueError: naming the argument, what was found and what was expected.
    """
    features, queries, position = join_autocast(features, queries, position)
    sizes: dict[str, int] = {}
    check_tensor("features", features, ("B", "P", "C"), sizes)
    if queries is not None:
        check_tensor("queries", queries, ("B", "Q", "C"), sizes)
        check_same("features", features, "queries", queries)
    elif allowed is None:
        raise ValueError("pool_prototypes needs queries, or allowed, or both: without them there is nothing to pool for")
    position = check_position(position, features)
    check_allowed(allowed, sizes)
    check_divides("heads", heads, "C", sizes["C"])
    chosen, _ = choose_backend("pool_prototypes", features, queries, allowed, asked=backend)
    return chosen.implementation(features, queries, allowed, position, heads=heads)
