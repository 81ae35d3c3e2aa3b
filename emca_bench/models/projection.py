"""Linear layers over many tokens on CPUs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from emca_bench import onednn


def infers_on_cpu(tensor: Tensor) -> bool:
    """Whether work on this tensor may be arranged for a CPU: no gradient is recorded, and no compiler arranges it."""
    return tensor.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def project(linear: nn.Linear, tokens_BPC: Tensor) -> Tensor:
    """`linear(tokens)`, [B, P, out]; by oneDNN where torch would ask its BLAS. A layer of another class is called as it is."""
    plain = type(linear) is nn.Linear and tokens_BPC.dtype == linear.weight.dtype == torch.float32
    if plain and infers_on_cpu(tokens_BPC) and onednn.refuses(tokens_BPC) is None:
        return onednn.linear(tokens_BPC, linear.weight, linear.bias)
    return linear(tokens_BPC)
