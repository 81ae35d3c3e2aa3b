"""Layers taken into their neighbours: the same function with fewer passes over the pixels."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from emca_bench.models.backbones.resnet import Conv2d, FrozenBatchNorm2d
from emca_bench.models.mask2former import Mask2Former

PROBE = (1, 3, 64, 64)
"""Shape of the image that shows, without values, which norm follows which convolution."""


def fold_batch_norms(model: Mask2Former) -> int:
    """Take each batch norm into the convolution whose output it gets, in place.

    Args:
        model: in evaluation mode, where statistics are fixed.

    Returns:
        How many were folded.
    """
    pairs = [(conv, "norm") for conv in model.modules() if isinstance(conv, Conv2d) and _is_batch_norm(getattr(conv, "norm", None))]
    for conv, name in pairs:
        _scale(conv, conv.get_submodule(name))
        delattr(conv, name)
    followers = _followers(model)
    for conv_path, norm_path in followers:
        norm = model.get_submodule(norm_path)
        _scale(model.get_submodule(conv_path), norm)
        parent, _, name = norm_path.rpartition(".")
        # timm's norm has its activation inside
        setattr(model.get_submodule(parent), name, getattr(norm, "act", None) or nn.Identity())
    return len(pairs) + len(followers)


def _is_batch_norm(module: object) -> bool:
    return isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d))


def _followers(model: nn.Module) -> list[tuple[str, str]]:
    """Paths of plain convolutions and of the batch norms that get their very output, found by a call without values."""
    probe = copy.deepcopy(model).to("meta")
    made: dict[int, tuple[str, Tensor]] = {}
    found = []

    def remember(path: str) -> Any:
        def hook(module: nn.Module, given: Any, output: Tensor) -> None:
            # the tensor is kept, so that no other gets its identity
            made[id(output)] = path, output

        return hook

    def look_up(path: str) -> Any:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            if id(given[0]) in made:
                found.append((made[id(given[0])][0], path))

        return hook

    for path, module in probe.named_modules():
        if isinstance(module, nn.Conv2d) and not isinstance(module, Conv2d):
            module.register_forward_hook(remember(path))
        elif _is_batch_norm(module):
            module.register_forward_pre_hook(look_up(path))
    with torch.no_grad():
        probe(torch.empty(PROBE, device="meta"))
    return found


@torch.no_grad()
def _scale(conv: Any, norm: Any) -> None:
    """Scale and shift of a batch norm in the weights of the convolution in front of it; computed in float64."""
    eps = getattr(norm, "eps", FrozenBatchNorm2d.EPS)
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    gain = (variance + eps).rsqrt() * (1 if norm.weight is None else norm.weight.double())
    shift = (0 if norm.bias is None else norm.bias.double()) - mean * gain
    bias = shift if conv.bias is None else shift + conv.bias.double() * gain
    weight = conv.weight.double() * gain[:, None, None, None]
    conv.weight = _parameter(weight, conv.weight)
    conv.bias = _parameter(bias, conv.weight)


@torch.no_grad()
def fold_mask_projection(model: Mask2Former) -> bool:
    """Take the last 1x1 convolution of the mask features into the mask embeddings, in place; whether there is one.

    For mask features W x + b and an embedding e, the logit e . (W x + b) is (e W) . x + e . b: the convolution of all pixels at
    stride 4 becomes a part of the last linear layer, which gives e W and, as one number more, e . b. It saves C^2 multiply-adds a
    pixel and a map of that size.
    """
    pixel_decoder: Any = model.sem_seg_head.pixel_decoder
    projection = getattr(pixel_decoder, "mask_features", None)
    if not isinstance(projection, nn.Conv2d) or projection.kernel_size != (1, 1):
        return False
    layers: Any = model.sem_seg_head.predictor.mask_embed.layers
    last = layers[-1]
    matrix = projection.weight.double().flatten(1)
    bias = matrix.new_zeros(len(matrix)) if projection.bias is None else projection.bias.double()
    onto = torch.cat([matrix, bias[:, None]], 1)
    joined = nn.Linear(last.in_features, onto.shape[1], device="meta")
    joined.weight = _parameter(onto.T @ last.weight.double(), last.weight)
    joined.bias = _parameter(last.bias.double() @ onto, last.weight)
    layers[-1] = joined
    pixel_decoder.mask_features = nn.Identity()
    return True


def _parameter(exact: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(exact.to(like.dtype), requires_grad=like.requires_grad)
