"""No cross-attention: the floor of every accuracy table and the bound of every speed table."""

from __future__ import annotations

from torch import Tensor

from emca_bench.models.attention.base import ATTENTIONS, CrossAttention


class NoCrossAttention(CrossAttention):
    """Queries never see the image in this sub-layer; self-attention and feed-forward stay. No parameters."""

    def forward(
        self,
        queries: Tensor,
        query_pos: Tensor | None,
        features: Tensor,
        feature_pos: Tensor | None,
        allowed: Tensor | None,
        *,
        shape: tuple[int, int],
    ) -> Tensor:
        """The queries as they came."""
        return queries

    def macs(self, *, pixels: int, queries: int) -> int:
        """None."""
        return 0


@ATTENTIONS.register("none")
def none(*, width: int) -> NoCrossAttention:
    """Queries never see the image."""
    return NoCrossAttention()
