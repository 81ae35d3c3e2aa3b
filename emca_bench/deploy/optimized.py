"""One call that makes a model fast without changing what it computes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from emca_bench.deploy.cuda_graph import GraphedModel
from emca_bench.deploy.folding import fold_batch_norms, fold_mask_projection
from emca_bench.deploy.onednn import use_onednn_layers
from emca_bench.errors import UsageError
from emca_bench.models.attention.masked import MaskedCrossAttention
from emca_bench.models.mask2former import Mask2Former
from emca_bench.onednn import refuses

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def optimize(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    channels_last: bool | None = None,
    fold_batch_norm: bool = True,
    use_onednn: bool | None = None,
    compile: bool = False,
    dynamic: bool | None = None,
    cuda_graph: bool = False,
) -> nn.Module:
    """A copy of a model for inference: the same outputs, faster. The model that is given stays as it is.

    Exact rewrites, always: attention masks from resized mask features (R2), intermediate masks and classes not made at all (R5), the
    fused form of masked cross-attention, the last convolution of the mask features taken to the side of the queries. Outputs are
    those of the model up to rounding, about 1e-6 of their scale in float32.

    Args:
        model: a `Mask2Former` of `emca_bench.models`, on its device.
        dtype: of the weights and the arithmetic; None leaves it. Halves are about twice as fast and not exact.
        channels_last: convolutions keep the channels of a pixel together; None: yes.
        fold_batch_norm: take batch norms with fixed statistics into the convolutions in front of them.
        use_onednn: convolutions, linear layers and mask products through oneDNN with ReLU and residual fused; None: where the
            model is on a CPU and torch has it. It serves any size, and has no gradients.
        compile: hand the result to `torch.compile` as one graph, which on a CPU chooses oneDNN itself and takes the weights as
            constants; minutes at the first call.
        dynamic: with `compile`: True makes one graph for all image sizes; None and False are `torch.compile`'s.
        cuda_graph: record all kernels at the first call and launch them as one from then on, for images of that shape alone.

    Returns:
        A `Mask2Former` in evaluation mode without gradients, or what `torch.compile` or `GraphedModel` made of it.

    Raises:
        UsageError: another kind of model, a dtype that is no floating point, oneDNN or a CUDA graph asked for where it cannot serve.
    """
    if not isinstance(model, Mask2Former):
        raise UsageError(f"optimize: a {type(model).__name__}; expected a Mask2Former of emca_bench.models")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"optimize: dtype={dtype}; expected one of {', '.join(map(str, DTYPES))}")
    if cuda_graph and model.pixel_mean.device.type != "cuda":
        raise UsageError(f"optimize: cuda_graph=True, but the model is on {model.pixel_mean.device}; expected a CUDA device")
    if cuda_graph and compile:
        raise UsageError("optimize: cuda_graph=True and compile=True; torch.compile(mode='reduce-overhead') records graphs of its own")
    faster = copy.deepcopy(model).eval().requires_grad_(False)
    # statistics of the images stay as precise as they are
    statistics = faster.pixel_mean, faster.pixel_std
    rewrite(faster, fold_batch_norm=fold_batch_norm)
    if dtype is not None:
        faster.to(dtype)
        faster.pixel_mean, faster.pixel_std = statistics
    if channels_last is None or channels_last:
        _lay_out(faster)
    why_not = "compile=True chooses its operators itself" if compile else refuses(next(faster.parameters()))
    if use_onednn and why_not:
        raise UsageError(f"optimize: use_onednn=True, but {why_not}")
    if compile:
        on_cpu = faster.pixel_mean.device.type == "cpu"
        compiled: Any = torch.compile(faster, fullgraph=True, dynamic=dynamic, options={"freezing": True} if on_cpu else None)
        return compiled
    if not why_not and use_onednn is not False:
        use_onednn_layers(faster)
    return GraphedModel(faster) if cuda_graph else faster


def rewrite(model: Mask2Former, *, fold_batch_norm: bool = True) -> None:
    """The exact rewrites that any runtime profits from, in place; the model must be in evaluation mode."""
    model.sem_seg_head.predictor.mask_source = "features"
    fold_mask_projection(model)
    if fold_batch_norm:
        fold_batch_norms(model)
    for module in model.modules():
        if isinstance(module, MaskedCrossAttention):
            module.fused = True


def _lay_out(model: nn.Module) -> None:
    """Channels last, weight by weight: `Module.to` would also turn weights of four dimensions that are no convolution's."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
