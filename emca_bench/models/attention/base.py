"""What every cross-attention of the mask decoder looks like, and the registry of their names."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from emca_bench.errors import UsageError, did_you_mean, listing
from emca_bench.registry import Registry


class CrossAttention(nn.Module, ABC):
    """Queries look at the pixels of one feature level.

    A rival is one file: a subclass, registered under its name with a factory of keyword-only switches.

    Attributes:
        normalises_queries: whether it has a layer norm of its own in front of the query projection.
    """

    normalises_queries: bool = False

    @abstractmethod
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
        """Updated queries, residual included, layer norm of the decoder not.

        Args:
            queries: [B, Q, C].
            query_pos: [B, Q, C] or broadcastable, or None.
            features: [B, P, C] pixel features of the level, row by row.
            feature_pos: [B, P, C] or broadcastable, or None.
            allowed: bool [B, Q, P], True where the query may look, or None. What happens to a query that may look nowhere is
                the module's rule.
            shape: (h, w) of the level, h * w = P.

        Returns:
            [B, Q, C].
        """

    @abstractmethod
    def macs(self, *, pixels: int, queries: int) -> int:
        """Multiply-adds of one image in closed form (SPEC section 4), to cross-check the counter."""


Factory = Callable[..., CrossAttention]

ATTENTIONS: Registry[Factory] = Registry("attention")


def build_attention(name: str, *, width: int = 256, heads: int | None = None, **switches: Any) -> CrossAttention:
    """A cross-attention by its registry name.

    Args:
        name: "masked", "masked_fused", "emca", "pem_ca", "pem_ca_published", "emca_soft", "mask_pooling", "mask_mean", "none", ...
        width: model width C.
        heads: attention heads; None takes the preset's number.
        switches: of the attention, see its factory.

    Raises:
        UsageError: an unknown name or switch, or a value that the switch does not take.
    """
    factory = ATTENTIONS[name]
    if heads is not None:
        switches["heads"] = heads
    known = [parameter for parameter in inspect.signature(factory).parameters if parameter != "width"]
    for switch in switches:
        if switch not in known:
            raise UsageError(
                f"attention {name!r} has no switch {switch!r}{did_you_mean(switch, known)}; its switches: {listing(known) or 'none'}"
            )
    return factory(width=width, **switches)


def with_position(content: Tensor, position: Tensor | None) -> Tensor:
    """Content plus its positional embedding, where there is one."""
    return content if position is None else content + position
