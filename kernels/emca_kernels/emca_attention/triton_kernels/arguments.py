"""What the two kernels are given, and what they are compiled for."""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from emca_kernels.emca_attention.arguments import Projections
from emca_kernels.masks import Mask
from emca_kernels.pool_prototypes.triton_kernels.kernels import Parts

ARGMAX = tl.constexpr(0)
SOFTMAX = tl.constexpr(1)
MEAN = tl.constexpr(2)


class Call(NamedTuple):
    """One call of the operator; see `emca_kernels.emca_attention`."""

    features_BPC: Tensor
    queries_BQC: Tensor
    mask: Mask | None
    position_BPC: Tensor | None
    query_position_BQC: Tensor | None
    projections: Projections
    """Contiguous."""
    scale: Tensor | None
    selection: str
    residual: str


class Found(NamedTuple):
    """What the first launch leaves to the second. Tensors that a selection has no use for are stood for by the queries."""

    projected: Tensor
    """[B, Q, D]"""
    folded: Tensor
    """[B, Q, C], scratch of the first launch, where the folded queries go through memory."""
    keys: Tensor
    """[B, Q, splits], of argmax."""
    parts: Parts
    """Rows [B, Q], of the others."""


class Searching(NamedTuple):
    """What the first launch is compiled for, beside `Tiling`."""

    SELECTION: int
    """ARGMAX, SOFTMAX or MEAN."""
    SCALED: bool
    QUERY_POSITION: bool
    FOLD_ON_CHIP: bool
    BLOCKS_Q: int
    BLOCK_X: int
    """Channels of a piece of the queries."""
    BLOCK_D: int
    """Key channels of a piece."""
    BLOCK_V: int
    """Channels whose sums a program keeps."""


class Attending(NamedTuple):
    """What the second launch is compiled for."""

    SELECTION: int
    POSITION: bool
    PROJECTED_RESIDUAL: bool
    SMALLEST: float
    """A 2-norm is taken to be at least this."""
    BLOCK_R: int
    """Rows of a program."""
    BLOCK_S: int
    """Keys that are compared at a time."""
    BLOCK_C: int
    """All channels."""
    BLOCK_D: int
    """All key channels."""
    BLOCK_K: int
    """Channels of a piece of a product."""
    UPCAST: bool
