"""Argument checks: an error names the argument, its shape and what was expected."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from emca_kernels.autocast import follow_autocast
from emca_kernels.masks import BoolMask, EmbeddingMask, LogitMask, Mask, PackedMask

MOST_SIGNATURES = 4096


def once_per_signature(check: Callable[..., None]) -> Callable[..., None]:
    """A check that depends on shapes, dtypes and devices alone, run once for each combination of them.

    A model calls an operator with the same few signatures over and over; the checks of a call cost more than the call itself may.
    """
    passed: set[Any] = set()

    @functools.wraps(check)
    def checked(*arguments: Any) -> None:
        if torch.compiler.is_compiling():
            return check(*arguments)
        signature = tuple([_signature(argument) for argument in arguments])
        try:
            if signature in passed:
                return None
        except TypeError:
            # a size that is a symbol, or an argument of a wrong type
            return check(*arguments)
        check(*arguments)
        if len(passed) >= MOST_SIGNATURES:
            passed.clear()
        passed.add(signature)
        return None

    return checked


def _signature(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.shape, argument.dtype, argument.device
    if isinstance(argument, Mask):
        return type(argument), *(_signature(part) for part in vars(argument).values())
    return argument


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


def as_mask(allowed: object) -> Any:
    """A mask in one of the forms of `emca_kernels.masks`, in the dtype of autocast; anything else as it is, for `check_mask` to refuse."""
    if isinstance(allowed, Tensor):
        return BoolMask(allowed)
    return EmbeddingMask(*follow_autocast(allowed.embedding_BQE, allowed.features_BPE)) if isinstance(allowed, EmbeddingMask) else allowed


def check_mask(allowed: Mask | None, sizes: dict[str, int]) -> None:
    """Check a mask from `as_mask` against sizes B and P, and Q if it is known; adds Q."""
    expected: dict[str, int] = {name: sizes[name] for name in ("B", "Q", "P") if name in sizes}
    match allowed:
        case None:
            return
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
            check_tensor("embedding_BQE", embedding, ("B", "Q", "E"), expected)
            check_tensor("features_BPE", features, ("B", "P", "E"), expected)
            check_same("embedding_BQE", embedding, "features_BPE", features)
        case _:
            raise TypeError(f"allowed must be a bool tensor [B, Q, P], True = may be chosen; found {type(allowed).__name__}")
    sizes.update(expected)


def _check_dtype(name: str, tensor: object, dtype: torch.dtype, expected: str) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
        found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a {expected}; found {found}")


def check_position(position: Tensor | None, content: Tensor, name: str = "position", of: str = "features") -> None:
    """Check positions [N, C] or [B, N, C] that broadcast to content [B, N, C], features or queries."""
    if position is None:
        return
    if not isinstance(position, Tensor) or position.dim() < 2 or position.dim() > 3:
        found = list(position.shape) if isinstance(position, Tensor) else type(position).__name__
        raise ValueError(f"{name} has shape {found}, expected [N, C] or [B, N, C] as the {of} {list(content.shape)}")
    check_same(of, content, name, position)
    batch, count, width = content.shape
    located = position if position.dim() == 3 else position[None]
    check_shape(name, located, ("B", "N", "C"), {"B": 1 if len(located) == 1 else batch, "N": count, "C": width})


def as_large(position: Tensor | None, content: Tensor) -> Tensor | None:
    """Positions that passed `check_position` in the shape of their content, nothing copied."""
    return position if position is None or position.shape == content.shape else position.expand_as(content)


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
