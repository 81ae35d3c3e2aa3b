"""Convolutions as the original's pixel decoders have them."""

from __future__ import annotations

from torch import Tensor, nn

from emca_bench.models.backbones.resnet import Conv2d


def group_norm32(width: int) -> nn.GroupNorm:
    """The original's norm at 256 channels; fewer groups only where the width is not a multiple of 32."""
    return nn.GroupNorm(32 if width % 32 == 0 else 8, width)


def conv_norm(source: int, target: int, kernel: int, *, relu: bool = False) -> Conv2d:
    """Convolution, group norm and an optional ReLU, initialised for it (Caffe2's Xavier: fan in, uniform)."""
    conv = Conv2d(source, target, kernel, norm=group_norm32, relu=relu)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return conv


def mask_projection(width: int, mask_width: int) -> nn.Conv2d:
    """The last 1x1 convolution to mask features."""
    conv = nn.Conv2d(width, mask_width, 1)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


def upsample_to(features: Tensor, like: Tensor) -> Tensor:
    """Bilinear resize to the size of another map, pixel centres aligned."""
    return nn.functional.interpolate(features, size=like.shape[-2:], mode="bilinear", align_corners=False)
