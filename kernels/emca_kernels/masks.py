"""What a mask allows."""

from __future__ import annotations

from torch import Tensor


def allow_everywhere_if_empty(allowed_BQP: Tensor) -> Tensor:
    """Mask2Former's rule, per query: a query that no pixel is allowed for may look everywhere."""
    return allowed_BQP | ~allowed_BQP.any(-1, keepdim=True)
