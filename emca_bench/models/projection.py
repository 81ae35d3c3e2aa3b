"""Linear layers over many tokens on CPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def infers_on_cpu(tensor: Tensor) -> bool:
    """Whether work on this tensor may be arranged for a CPU: no gradient is recorded, and no compiler arranges it."""
    return tensor.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def project(linear: nn.Linear, tokens_BPC: Tensor) -> Tensor:
    """`linear(tokens)`, [B, P, out].

    A float32 linear layer of torch goes to MKL, which takes half the speed of some CPUs; a 1x1 convolution goes to oneDNN, which is as
    fast as them all. So tokens, where they are whole, pass as a map of one row with its channels last: the same memory.
    """
    if not (infers_on_cpu(tokens_BPC) and tokens_BPC.dtype == torch.float32 and tokens_BPC.is_contiguous() and _has_onednn()):
        return linear(tokens_BPC)
    map_BC1P = tokens_BPC[:, None].permute(0, 3, 1, 2)
    return F.conv2d(map_BC1P, linear.weight[:, :, None, None], linear.bias).permute(0, 2, 3, 1).squeeze(1)


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
