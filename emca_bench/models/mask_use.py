"""Whether the cross-attentions of a model see their masks: always, never, or less and less as training goes on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from emca_bench.errors import UsageError, did_you_mean
from emca_bench.models.attention.base import CrossAttention

MASK_USES = ("always", "annealed", "never")


class MaskUse:
    """Takes masks away in front of the cross-attentions, which then look everywhere; the decoder makes them all the same.

    Annealed, a layer keeps its mask in a training step with probability `share`, which the training lowers from 1 to 0, and never in
    evaluation: what is deployed needs no masks in between. Source: Kerssies et al., EoMT, CVPR 2025.

    Args:
        kind: one of MASK_USES.

    Attributes:
        share: see above; 1 before training.

    Raises:
        UsageError: an unknown kind.
    """

    def __init__(self, kind: str) -> None:
        if kind not in MASK_USES:
            raise UsageError(f"mask_use={kind!r}{did_you_mean(kind, MASK_USES)}; expected one of {', '.join(MASK_USES)}")
        self.kind, self.share = kind, 1.0

    def attach(self, model: nn.Module) -> None:
        """Stand in front of every cross-attention of a model."""
        for module in model.modules():
            if isinstance(module, CrossAttention):
                module.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._keeps(module.training):
            return positional, named
        queries, query_pos, features, feature_pos, _ = positional
        return (queries, query_pos, features, feature_pos, None), named

    def _keeps(self, training: bool) -> bool:
        return self.kind == "annealed" and training and bool(torch.rand(()) < self.share)
