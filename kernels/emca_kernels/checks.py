"""Argument checks: an error names the argument, its shape and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from emca_kernels.autocast import follow_autocast
from emca_kernels.masks import BoolMask, EmbeddingMask, LogitMask, Mask, PackedMask


def check_tensor(name: str, tensor: object, dims: Sequence[str], sizes: dict[str, int]) -> None:
    """Check the rank of a floating-point tensor and the sizes that its dimensions share with earlier arguments.

    Args:
        name: the argument.
        tensor: its value.
        dims: a name per dimension, for example ("B", "P", "C").
        sizes: sizes known so far; new ones are added.

    Raises:
        TypeError: not a tensor, or not floating point.
        ValueError: another rank or size than expected.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor [{', '.join(dims)}], found {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, found {tensor.dtype}")
    check_shape(name, tensor, dims, sizes)


def check_shape(name: str, tensor: Tensor, dims: Sequence[str], sizes: dict[str, int]) -> None:
    """Check rank and shared sizes as `check_tensor` does, whatever the dtype."""
    shape = tuple(tensor.shape)
    if len(shape) != len(dims) or any(sizes.get(dim, size) != size for dim, size in zip(dims, shape, strict=True)):
        expected = ", ".join(f"{dim}={sizes[dim]}" if dim in sizes else dim for dim in dims)
        raise ValueError(f"{name} has shape {list(shape)}, expected [{expected}]")
    sizes.update(zip(dims, shape, strict=True))


def check_mask(allowed: Tensor | Mask | None, sizes: dict[str, int]) -> Mask | None:
    """Check a mask, a bool tensor [B, Q, P] or one of `emca_kernels.masks`, against sizes B and P, and Q if it is known; as a `Mask`."""
    if isinstance(allowed, Tensor):
        allowed = BoolMask(allowed)
    expected: dict[str, int] = {name: sizes[name] for name in ("B", "Q", "P") if name in sizes}
    match allowed:
        case None:
            return None
        case BoolMask(tensor):
            _check_dtype("allowed", tensor, torch.bool, "bool tensor [B, Q, P], True = may be chosen")
            check_shape("allowed", tensor, ("B", "Q", "P"), expected)
        case PackedMask(words, pixels):
            _check_dtype("words_BQW", words, torch.int32, "int32 tensor [B, Q, W], a bit per pixel")
            check_shape("words_BQW", words, ("B", "Q", "W"), expected | {"W": -(-sizes["P"] // 32)})
            if pixels != sizes["P"]:
                raise ValueError(f"PackedMask has pixels={pixels}, expected P={sizes['P']}")
        case LogitMask(logits):
            check_tensor("logits_BQP", logits, ("B", "Q", "P"), expected)
        case EmbeddingMask(embedding, features):
            embedding, features = follow_autocast(embedding, features)
            check_tensor("embedding_BQE", embedding, ("B", "Q", "E"), expected)
            check_tensor("features_BPE", features, ("B", "P", "E"), expected)
            check_same("embedding_BQE", embedding, "features_BPE", features)
            allowed = EmbeddingMask(embedding, features)
        case _:
            raise TypeError(f"allowed must be a bool tensor [B, Q, P], True = may be chosen; found {type(allowed).__name__}")
    sizes.update(expected)
    return allowed


def _check_dtype(name: str, tensor: object, dtype: torch.dtype, expected: str) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
        found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a {expected}; found {found}")


def check_position(position: Tensor | None, content: Tensor, name: str = "position", of: str = "features") -> Tensor | None:
    """Check positions that broadcast to content [B, N, C], features or queries, and return them as [B, N, C]."""
    if position is None:
        return None
    if not isinstance(position, Tensor) or position.dim() < 2 or position.dim() > 3:
        found = list(position.shape) if isinstance(position, Tensor) else type(position).__name__
        raise ValueError(f"{name} has shape {found}, expected [N, C] or [B, N, C] as the {of} {list(content.shape)}")
    check_same(of, content, name, position)
    batch, count, width = content.shape
    located = position if position.dim() == 3 else position[None]
    check_shape(name, located, ("B", "N", "C"), {"B": 1 if len(located) == 1 else batch, "N": count, "C": width})
    return position.expand_as(content)


def check_same(first: str, one: Tensor, second: str, other: Tensor) -> None:
    """Check that two arguments share device and dtype."""
    if one.device != other.device:
        raise ValueError(f"{second} is on {other.device}, {first} on {one.device}: expected the same device")
    if one.dtype != other.dtype:
        raise TypeError(f"{second} is {other.dtype}, {first} {one.dtype}: expected the same dtype")


def check_divides(what: str, parts: int, name: str, whole: int) -> None:
    """Check that `whole` splits into `parts`."""
    if parts < 1 or whole % parts:
        raise ValueError(f"{what}={parts} must divide {name}={whole}")
