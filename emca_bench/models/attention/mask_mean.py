"""The mean of the mask through one linear layer: what masked cross-attention does where all its weights are equal."""

from __future__ import annotations

from emca_kernels import pool_prototypes
from torch import Tensor, nn

from emca_bench.models.attention.base import ATTENTIONS, CrossAttention
from emca_bench.models.attention.prototypes import mask_or_full


class MaskMean(CrossAttention):
    """No query is compared with a pixel, and none is multiplied with what it gets: all that it brings along is its mask.

    With equal weights masked cross-attention is its two last projections, one behind the other, of the mean of the allowed pixels
    without their positions; they are one here. A query that may look nowhere looks everywhere.

    Args:
        width: C.
        positions: whether positional embeddings are added to the features, as to what EMCA chooses from.
    """

    def __init__(self, *, width: int, positions: bool = True) -> None:
        super().__init__()
        self.width, self.positions = width, positions
        self.projection = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

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
        """See `CrossAttention.forward`."""
        position_BPC = feature_pos if self.positions else None
        mean_BQMC = pool_prototypes(features, None, mask_or_full(allowed, features, queries), position=position_BPC)
        return queries + self.projection(mean_BQMC.flatten(2))

    def macs(self, *, pixels: int, queries: int) -> int:
        """See `CrossAttention.macs`."""
        return queries * self.width * (pixels + self.width)


@ATTENTIONS.register("mask_mean")
def mask_mean(*, width: int, positions: bool = True) -> MaskMean:
    """The mean of the allowed pixels through one linear layer, added to the query: no search, no product."""
    return MaskMean(width=width, positions=positions)
