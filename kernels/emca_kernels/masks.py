"""What a mask allows, and the forms in which it comes: a truth value, a bit, a logit, or two factors of a logit per query and pixel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def allow_everywhere_if_empty(allowed_BQP: Tensor) -> Tensor:
    """Mask2Former's rule, per query: a query that no pixel is allowed for may look everywhere."""
    return allowed_BQP | ~allowed_BQP.any(-1, keepdim=True)


@dataclass(frozen=True)
class BoolMask:
    """True where a query may look."""

    allowed_BQP: Tensor
    """bool."""

    def allowed(self) -> Tensor:
        """Bool [B, Q, P]."""
        return self.allowed_BQP


@dataclass(frozen=True)
class PackedMask:
    """A bit per pixel: 1/8 of the bytes of a bool mask."""

    words_BQW: Tensor
    """int32, W = ceil(P / 32); bit j of word w is pixel 32 w + j."""
    pixels: int

    @classmethod
    def pack(cls, allowed_BQP: Tensor) -> PackedMask:
        """Of a bool mask; bits beyond P are 0."""
        pixels = allowed_BQP.shape[-1]
        bits = torch.nn.functional.pad(allowed_BQP.to(torch.int64), (0, -pixels % 32)).unflatten(-1, (-1, 32))
        words = (bits << torch.arange(32, device=bits.device)).sum(-1)
        return cls(torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32), pixels)

    def allowed(self) -> Tensor:
        """Bool [B, Q, P]."""
        bits = (self.words_BQW[..., None] >> torch.arange(32, device=self.words_BQW.device, dtype=torch.int32)) & 1
        return bits.flatten(-2)[..., : self.pixels] != 0


@dataclass(frozen=True)
class LogitMask:
    """Mask logits at the level's size: a query may look where its logit is not negative (SPEC section 2)."""

    logits_BQP: Tensor
    """Floating point."""

    def allowed(self) -> Tensor:
        """Bool [B, Q, P]."""
        return self.logits_BQP >= 0


@dataclass(frozen=True)
class EmbeddingMask:
    """Mask logits as the product of a query's mask embedding with the level's pixel features (SPEC section 3, R2 and R3)."""

    embedding_BQE: Tensor
    """Floating point."""
    features_BPE: Tensor
    """The same dtype."""

    def allowed(self) -> Tensor:
        """Bool [B, Q, P]."""
        return self.embedding_BQE @ self.features_BPE.mT >= 0


Mask = BoolMask | PackedMask | LogitMask | EmbeddingMask


def allowed_of(mask: Mask | None) -> Tensor | None:
    """Bool [B, Q, P] of any mask, for backends that read nothing else."""
    return None if mask is None else mask.allowed()


def parts_of(mask: Mask | None) -> tuple[Tensor | None, Tensor | None]:
    """The tensors of a mask, as they pass the boundary of an operator; no gradient flows through a mask."""
    match mask:
        case None:
            return None, None
        case BoolMask(one) | LogitMask(one) | PackedMask(one):
            return one.detach(), None
        case EmbeddingMask(embedding, features):
            return embedding.detach(), features.detach()


def from_parts(one: Tensor | None, other: Tensor | None, pixels: int) -> Mask | None:
    """The mask that `parts_of` took apart: dtypes tell which it was."""
    if one is None:
        return None
    if other is not None:
        return EmbeddingMask(one, other)
    if one.dtype == torch.bool:
        return BoolMask(one)
    return LogitMask(one) if one.is_floating_point() else PackedMask(one, pixels)
