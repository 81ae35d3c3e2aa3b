"""Mask2Former's masked cross-attention, as published and with the fused kernel: the two baselines of every speed table."""

from __future__ import annotations

import torch.nn.functional as F
from emca_kernels.masks import allow_everywhere_if_empty
from torch import Tensor, nn

from emca_bench.errors import UsageError
from emca_bench.models.attention.base import ATTENTIONS, CrossAttention, with_position


class MaskedCrossAttention(nn.MultiheadAttention, CrossAttention):
    """Multi-head attention over the allowed pixels; keys carry positions, values do not; a query with an empty mask sees everything.

    Parameter names are those of `nn.MultiheadAttention`, and so of Mask2Former's checkpoints.

    Source: Cheng et al., Masked-attention Mask Transformer, 2022, equation 2; code at facebookresearch/Mask2Former.

    Args:
        width: model width C.
        heads: attention heads, divides C.
        fused: False asks for the attention weights, as the published code does without using them, and so never takes the fused
            path; True calls scaled_dot_product_attention. Same function.
    """

    def __init__(self, *, width: int, heads: int, fused: bool) -> None:
        if heads < 1 or width % heads:
            raise UsageError(f"heads={heads} must divide the model width {width}")
        super().__init__(width, heads, dropout=0.0, batch_first=True)
        self.fused = fused
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(  # type: ignore[override]
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
        if allowed is not None:
            allowed = allow_everywhere_if_empty(allowed)
        attend = self._attend_fused if self.fused else self._attend_published
        return queries + attend(with_position(queries, query_pos), with_position(features, feature_pos), features, allowed)

    def _attend_published(self, queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None) -> Tensor:
        blocked = None if allowed is None else (~allowed).repeat_interleave(self.num_heads, dim=0)
        return super().forward(queries, keys, values, attn_mask=blocked)[0]

    def _attend_fused(self, queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None) -> Tensor:
        q_BMQd, k_BMPd, v_BMPd = (
            self.project(tokens, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for tokens, weight, bias in zip((queries, keys, values), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        )
        return self.out_proj(self._attend_heads(q_BMQd, k_BMPd, v_BMPd, allowed).transpose(1, 2).flatten(2))

    def _attend_heads(self, q_BMQd: Tensor, k_BMPd: Tensor, v_BMPd: Tensor, allowed: Tensor | None) -> Tensor:
        mask = None if allowed is None else allowed[:, None]
        return F.scaled_dot_product_attention(q_BMQd, k_BMPd, v_BMPd, attn_mask=mask)

    project = staticmethod(F.linear)

    def macs(self, *, pixels: int, queries: int) -> int:
        """Keys, values and two products with the pixels; two projections of the queries."""
        width = self.embed_dim
        return pixels * (2 * width * width + 2 * queries * width) + 2 * queries * width * width


@ATTENTIONS.register("masked")
def masked(*, width: int, heads: int = 8) -> MaskedCrossAttention:
    """Masked cross-attention as published: attention weights requested."""
    return MaskedCrossAttention(width=width, heads=heads, fused=False)


@ATTENTIONS.register("masked_fused")
def masked_fused(*, width: int, heads: int = 8) -> MaskedCrossAttention:
    """The same function through scaled_dot_product_attention."""
    return MaskedCrossAttention(width=width, heads=heads, fused=True)
