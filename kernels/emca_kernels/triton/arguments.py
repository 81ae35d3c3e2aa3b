"""From tensors and masks to the arguments of kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emca_kernels.masks import BoolMask, EmbeddingMask, LogitMask, Mask, PackedMask, parts_of
from emca_kernels.triton.configs import Config, power_of_two
from emca_kernels.triton.runtime import interpreting


def matrix_arguments(name: str, tensor: Tensor | None, dims: str, *, instead: Tensor | None = None) -> dict[str, Any]:
    """A tensor and its strides, `<name>_stride_<dim>` for each letter of `dims`; `instead` stands for one that is not there."""
    strides = (0,) * len(dims) if tensor is None else tensor.stride()
    found = instead if tensor is None else tensor
    return {name: found, **{f"{name}_stride_{dim}": stride for dim, stride in zip(dims, strides, strict=True)}}


def mask_arguments(mask: Mask | None, instead: Tensor) -> dict[str, Any]:
    """MASK (see `tiles`), the mask's tensors, strides and width; `instead` stands for tensors that are not there."""
    first: Tensor | None = None
    second: Tensor | None = None
    kind = 0
    match mask:
        case BoolMask(allowed):
            kind, first = 1, allowed.view(torch.uint8)
        case PackedMask(words, _):
            kind, first = 2, words
        case LogitMask(logits):
            kind, first = 3, logits
        case EmbeddingMask(embedding, features):
            kind, first, second = 4, embedding, features
    return {
        **matrix_arguments("mask", first, "bqp", instead=instead),
        **matrix_arguments("mask_features", second, "bpe", instead=instead),
        "mask_width": 0 if second is None else second.shape[2],
        "MASK": kind,
    }


def needs_upcast(features: Tensor, mask: Mask | None) -> bool:
    """Whether a product of tiles must be float32 because the interpreter would multiply bfloat16 as integers."""
    factors = [features.dtype] + ([mask.embedding_BQE.dtype] if isinstance(mask, EmbeddingMask) else [])
    return interpreting() and torch.bfloat16 in factors


def count_queries(queries: Tensor | None, mask: Mask | None) -> int:
    """Q, by the mask where there are no queries."""
    counted = parts_of(mask)[0] if queries is None else queries
    assert counted is not None
    return counted.shape[1]


def stream_arguments(
    features: Tensor, queries: Tensor | None, mask: Mask | None, position: Tensor | None, config: Config, *, width: int, block_q: int
) -> dict[str, Any]:
    """What every kernel takes that streams pixels past queries; `width` is that of a head."""
    masking = mask_arguments(mask, features)
    mask_resident = masking["mask_width"] <= config.resident
    return {
        **matrix_arguments("features", features, "bpc"),
        **matrix_arguments("position", position, "bpc", instead=features),
        **matrix_arguments("queries", queries, "bqc", instead=features),
        **masking,
        "query_count": count_queries(queries, mask),
        "pixels": features.shape[1],
        "width": width,
        "POSITION": position is not None,
        "RESIDENT": width <= config.resident,
        "MASK_RESIDENT": mask_resident,
        "BLOCK_Q": block_q,
        "BLOCK_P": config.block_p,
        "BLOCK_C": power_of_two(width) if width <= config.resident else config.piece,
        "BLOCK_E": power_of_two(masking["mask_width"]) if mask_resident else config.piece,
        "UPCAST": needs_upcast(features, mask),
    }


MASKS = ("none", "bool", "packed", "logit", "embedding")


def example_mask(kind: str, features: Tensor, queries: int) -> Mask | None:
    """A mask of each kind without values, for compiling."""
    batch, pixels, channels = features.shape
    match kind:
        case "bool":
            return BoolMask(features.new_empty(batch, queries, pixels, dtype=torch.bool))
        case "packed":
            return PackedMask(features.new_empty(batch, queries, -(-pixels // 32), dtype=torch.int32), pixels)
        case "logit":
            return LogitMask(features.new_empty(batch, queries, pixels))
        case "embedding":
            return EmbeddingMask(features.new_empty(batch, queries, channels), features.new_empty(batch, pixels, channels))
    return None
