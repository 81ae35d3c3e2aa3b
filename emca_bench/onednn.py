"""Products of matrices by oneDNN on a CPU, without gradients.

torch multiplies float32 matrices with the BLAS that it was built with, and calls oneDNN for convolutions alone. oneDNN is the faster one
where that BLAS does not know the processor, and what follows a product needs no second pass. The operators are those that `torch.compile`
calls for frozen models.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)


def refuses(tensor: Tensor) -> str | None:
    """Why a tensor of this device and dtype cannot be served here, or None."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "a compiler or tracer wants standard operators"
    if tensor.device.type != "cpu":
        return f"oneDNN serves the CPU, found {tensor.device.type}"
    if tensor.dtype not in DTYPES:
        return f"oneDNN serves float32 and bfloat16, found {tensor.dtype}"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this torch was built without oneDNN"
    if tensor.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this processor has no bfloat16 that oneDNN can use"
    return None


def linear(tokens: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """`F.linear` of tokens [..., C] that `refuses` nothing about, a ReLU behind it if asked for."""
    if not tokens.numel() or not weight.numel():
        plain = F.linear(tokens, weight, bias)
        return F.relu(plain) if relu else plain
    return torch.ops.mkldnn._linear_pointwise(tokens, weight, bias, "relu" if relu else "none", [], "")
