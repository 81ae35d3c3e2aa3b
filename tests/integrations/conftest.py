"""Hugging Face models of any size with weights that leave nothing at its default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from emca_bench.models.backbones.torchvision_shim import make_torchvision_importable

make_torchvision_importable()
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig, SwinConfig  # noqa: E402

STAGES = ["stage1", "stage2", "stage3", "stage4"]
BACKBONES: dict[str, Callable[[], Any]] = {
    "resnet": lambda: ResNetConfig(embedding_size=16, hidden_sizes=[64, 128, 256, 512], depths=[1, 2, 1, 1], out_features=STAGES),
    "resnet_basic": lambda: ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 2, 1], layer_type="basic", out_features=STAGES
    ),
    "swin": lambda: SwinConfig(embed_dim=16, depths=[1, 2, 2, 1], num_heads=[1, 2, 4, 8], window_size=4, out_features=STAGES),
    "resnet50": lambda: ResNetConfig(out_features=STAGES),
}
TINY = {
    "hidden_dim": 64,
    "feature_size": 64,
    "mask_feature_size": 64,
    "encoder_feedforward_dim": 48,
    "dim_feedforward": 80,
    "encoder_layers": 2,
    "decoder_layers": 5,
    "num_queries": 10,
    "num_labels": 5,
    "num_attention_heads": 4,
}


def _disturb(model: nn.Module) -> None:
    """Biases, norms, statistics, sampling offsets: all off their start."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "sampling_offsets" in name or "attention_weights" in name or "position_bias" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.7, 1.4)
                # keeps deep residual networks of random weights in range
                module.weight.uniform_(0.5, 0.9)


@pytest.fixture
def make_hf() -> Callable[..., Mask2FormerForUniversalSegmentation]:
    """A model by the name of its backbone; in evaluation mode."""

    def make(backbone: str, **settings: Any) -> Mask2FormerForUniversalSegmentation:
        sizes = {} if backbone == "resnet50" else TINY
        config = Mask2FormerConfig(backbone_config=BACKBONES[backbone](), **{**sizes, **settings})
        model = Mask2FormerForUniversalSegmentation(config).eval()
        _disturb(model)
        return model

    return make
