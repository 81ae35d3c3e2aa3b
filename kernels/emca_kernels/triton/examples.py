"""Calls without values, by which kernels are compiled without a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from emca_kernels.masks import BoolMask, EmbeddingMask, LogitMask, Mask, PackedMask

MASKS = ("none", "bool", "packed", "logit", "embedding")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Example(NamedTuple):
    """What every operator takes that streams pixels past queries."""

    features: Tensor
    queries: Tensor
    mask: Mask | None
    position: Tensor | None


def example(dtype: str, mask: str, width: int, queries: int, extra: str = "") -> Example:
    """B=2 and 32768 pixels; `extra` is "position", "pixels contiguous" or anything else."""
    features = torch.empty(2, 32768, width, dtype=DTYPES[dtype], device="meta")
    position = features[:1].expand_as(features) if extra == "position" else None
    if extra == "pixels contiguous":
        features = features.mT.contiguous().mT
    return Example(features, features.new_empty(2, queries, width), example_mask(mask, features, queries), position)


def example_mask(kind: str, features: Tensor, queries: int) -> Mask | None:
    """A mask of each kind without values."""
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


def described(*parts: str) -> str:
    """The name of a call, of the parts that are there."""
    return " ".join(filter(None, parts))
