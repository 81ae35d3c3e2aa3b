"""Forms of an attention that are measured and that no model is built with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from emca_bench.models import CrossAttention, build_attention
from emca_bench.models.attention.masked import MaskedCrossAttention


class FlexMaskedCrossAttention(MaskedCrossAttention):
    """The same function through FlexAttention: fast only where it is compiled, no gradients on CPUs. Every call brings its own mask."""

    # a graph of its own: inductor finds no CPU kernel for queries that it computes itself
    @torch.compiler.disable(recursive=False)
    def _attend_heads(self, q_BMQd: Tensor, k_BMPd: Tensor, v_BMPd: Tensor, allowed: Tensor | None) -> Tensor:
        return _attend_flexibly(q_BMQd.contiguous(), k_BMPd.contiguous(), v_BMPd.contiguous(), allowed)


def _attend_flexibly(q_BMQd: Tensor, k_BMPd: Tensor, v_BMPd: Tensor, allowed_BQP: Tensor | None) -> Tensor:
    if allowed_BQP is None:
        return flex_attention(q_BMQd, k_BMPd, v_BMPd)

    def may_look(b: Tensor, _: Tensor, q: Tensor, p: Tensor) -> Tensor:
        return allowed_BQP[b, q, p]

    batch, queries, pixels = allowed_BQP.shape
    blocks = create_block_mask(may_look, batch, None, queries, pixels, device=allowed_BQP.device.type)
    return flex_attention(q_BMQd, k_BMPd, v_BMPd, block_mask=blocks)


def masked_flex(*, width: int, heads: int = 8) -> FlexMaskedCrossAttention:
    """Masked cross-attention through FlexAttention."""
    return FlexMaskedCrossAttention(width=width, heads=heads, fused=True)


RIVALS = {"masked_flex": masked_flex}


def build_measured(name: str, *, width: int, **switches: Any) -> CrossAttention:
    """A rival, or an attention of the registry, by name."""
    return RIVALS[name](width=width, **switches) if name in RIVALS else build_attention(name, width=width, **switches)
