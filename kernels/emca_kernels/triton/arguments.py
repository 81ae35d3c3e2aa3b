"""From tensors and masks to the arguments of kernels, which are named tuples."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypeVar

import torch
import triton.language as tl
from torch import Tensor

from emca_kernels.masks import BoolMask, EmbeddingMask, LogitMask, Mask, PackedMask, parts_of
from emca_kernels.triton.configs import Config, power_of_two
from emca_kernels.triton.runtime import interpreting

Strided = TypeVar("Strided", bound=tuple[Any, ...])
Constants = TypeVar("Constants", bound=tuple[Any, ...])


class Batched(NamedTuple):
    """A matrix of each image. How many rows and columns it has is said once, for all matrices of a kernel."""

    base: Tensor
    image_stride: int
    row_stride: int
    column_stride: int


class Streamed(NamedTuple):
    """What a kernel takes that streams pixels past queries. Tensors that are not there are stood for by others, and not read.

    Not `stream`: a parameter of that name is refused by Triton's launch.
    """

    features: Batched
    """[B, P, M * D]"""
    position: Batched
    """[B, P, M * D]"""
    queries: Batched
    """[B, Q, M * D]"""
    mask: Batched
    """[B, Q, P or words or E]"""
    mask_features: Batched
    """[B, P, E]"""
    query_count: int
    pixels: int
    width: int
    """D, the channels of a head."""
    mask_width: int
    """E"""


class Tiling(NamedTuple):
    """What a kernel that streams pixels is compiled for."""

    MASK: int
    """See `tiles`."""
    POSITION: bool
    RESIDENT: bool
    """Rows of queries are multiplied in one piece and stay on chip."""
    MASK_RESIDENT: bool
    """The same for the embeddings of masks."""
    BLOCK_Q: int
    BLOCK_P: int
    BLOCK_C: int
    BLOCK_E: int
    UPCAST: bool
    """Products must be float32 because the interpreter would multiply bfloat16 as integers."""


def strided(form: type[Strided], tensor: Tensor | None, *, instead: Tensor) -> Strided:
    """A tensor and its strides; `instead`, of as many dimensions, stands for one that is not there."""
    if tensor is None:
        return form(instead, *(0,) * instead.dim())
    return form(tensor, *tensor.stride())


@functools.lru_cache(maxsize=None, typed=True)
def constants(sizes: Constants) -> Constants:
    """A named tuple as an argument that a kernel is compiled for. Triton 3.6 makes shapes of wrapped numbers alone."""
    return type(sizes)(*map(tl.constexpr, sizes))


def mask_matrices(mask: Mask | None) -> tuple[int, Tensor | None, Tensor | None]:
    """Its kind (see `tiles`) and its tensors."""
    match mask:
        case BoolMask(allowed):
            return 1, allowed.view(torch.uint8), None
        case PackedMask(words, _):
            return 2, words, None
        case LogitMask(logits):
            return 3, logits, None
        case EmbeddingMask(embedding, features):
            return 4, embedding, features
    return 0, None, None


def needs_upcast(features: Tensor, mask: Mask | None) -> bool:
    """Whether a product of tiles must be float32 because the interpreter would multiply bfloat16 as integers."""
    factors = [features.dtype] + ([mask.embedding_BQE.dtype] if isinstance(mask, EmbeddingMask) else [])
    return interpreting() and torch.bfloat16 in factors


def count_queries(queries: Tensor | None, mask: Mask | None) -> int:
    """Q, by the mask where there are no queries."""
    counted = parts_of(mask)[0] if queries is None else queries
    assert counted is not None
    return counted.shape[1]


def streamed_of(features: Tensor, queries: Tensor | None, mask: Mask | None, position: Tensor | None, *, width: int) -> Streamed:
    """`width` is that of a head."""
    _, first, second = mask_matrices(mask)
    return Streamed(
        strided(Batched, features, instead=features),
        strided(Batched, position, instead=features),
        strided(Batched, queries, instead=features),
        strided(Batched, first, instead=features),
        strided(Batched, second, instead=features),
        count_queries(queries, mask),
        features.shape[1],
        width,
        0 if second is None else second.shape[2],
    )


def tiling_of(features: Tensor, mask: Mask | None, position: Tensor | None, config: Config, *, width: int, block_q: int) -> Tiling:
    """`width` is that of a head."""
    kind, _, second = mask_matrices(mask)
    mask_width = 0 if second is None else second.shape[2]
    resident, mask_resident = width <= config.resident, mask_width <= config.resident
    return Tiling(
        MASK=kind,
        POSITION=position is not None,
        RESIDENT=resident,
        MASK_RESIDENT=mask_resident,
        BLOCK_Q=block_q,
        BLOCK_P=config.block_p,
        BLOCK_C=power_of_two(width) if resident else config.piece,
        BLOCK_E=power_of_two(mask_width) if mask_resident else config.piece,
        UPCAST=needs_upcast(features, mask),
    )
