"""Prototype selection on Hopper: pixels stream through shared memory once, the score matrix never leaves the registers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from emca_kernels.build import load_failure
from emca_kernels.select_prototypes.cuda.recipe import CUDA

DTYPES = (torch.bfloat16, torch.float16)
WIDTHS = (64, 128, 192, 256)
CAPABILITY = (9, 0)
ALIGNMENT = 16
"""Bytes that TMA asks of the start of a tensor and of its strides."""


@torch.no_grad()
def select_prototypes(
    features_BPC: Tensor, queries_BQC: Tensor, allowed: Tensor | None, position_BPC: Tensor | None, *, k: int, heads: int
) -> tuple[Tensor, Tensor]:
    """See `emca_kernels.select_prototypes`; scores are summed in float32.

    Args:
        features_BPC: bfloat16 or float16, C one of `WIDTHS`; copied first if channels are not neighbours in memory.
        queries_BQC: the same dtype.
        allowed: bool [B, Q, P], or int32 [B, Q, ceil(P / 32)] where bit j of word w is pixel 32 w + j; None allows everything.
        position_BPC: added to the features.
        k: 1.
        heads: 1.

    Raises:
        ValueError: another k or number of heads.
    """
    if (k, heads) != (1, 1):
        raise ValueError(f"the backend 'cuda' cannot serve this call of select_prototypes: k={k}, heads={heads}, expected 1 and 1")
    if allowed is not None and allowed.stride(-1) != 1:
        allowed = allowed.contiguous()
    position = None if position_BPC is None else _copyable(position_BPC)
    return torch.ops.emca_cuda.select_prototypes(_copyable(features_BPC), _copyable(queries_BQC), allowed, position)


def refuses(features: Tensor, queries: Tensor, *_: Tensor | None) -> str | None:
    """The reason why this backend cannot serve tensors like these, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if features.device.type != "cuda":
        return f"{features.device.type} tensors"
    capability = torch.cuda.get_device_capability(features.device)
    if capability != CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]}, needs 9.0"
    if features.dtype not in DTYPES:
        return f"{features.dtype}".removeprefix("torch.")
    if features.shape[-1] not in WIDTHS:
        return f"C={features.shape[-1]}, needs one of {', '.join(map(str, WIDTHS))}"
    if features.numel() == 0 or queries.numel() == 0:
        return "empty tensors"
    return unavailable()


def refuses_unasked(*_: Tensor | None) -> str:
    """An arm of comparisons: nothing is built or preferred behind anyone's back."""
    return "serves when asked for"


@functools.cache
def unavailable() -> str | None:
    """Why the library is not there, or None; builds and loads it at the first call."""
    return load_failure(CUDA)


def _copyable(tensor: Tensor) -> Tensor:
    """The tensor if TMA can read it, else a copy. Images may share memory, rows may not."""
    (images, rows, width), (image_stride, row_stride, channel_stride) = tensor.shape, tensor.stride()
    strides = ([image_stride] if images > 1 else []) + ([row_stride] if rows > 1 else [])
    aligned = all(stride * tensor.element_size() % ALIGNMENT == 0 for stride in strides) and tensor.data_ptr() % ALIGNMENT == 0
    readable = channel_stride == 1 and aligned and (rows == 1 or row_stride >= width)
    return tensor if readable else tensor.clone(memory_format=torch.contiguous_format)
