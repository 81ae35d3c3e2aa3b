"""Feature pyramid: the light pixel decoder, under the names of the original's `BasePixelDecoder`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from emca_bench.models.backbones.base import LEVELS
from emca_bench.models.backbones.resnet import Conv2d
from emca_bench.models.pixel_decoders.base import PIXEL_DECODERS, PixelDecoder, PixelFeatures
from emca_bench.models.pixel_decoders.layers import conv_norm, mask_projection


class FPN(PixelDecoder):
    """Top-down pathway with lateral 1x1 and output 3x3 convolutions.

    Source: Lin et al., Feature Pyramid Networks, 2017, as MaskFormer uses it (group norm, nearest upsampling).

    Args:
        channels: of the backbone by level.
        width: C of the maps and mask features.
    """

    def __init__(self, *, channels: dict[str, int], width: int) -> None:
        super().__init__()
        self.pyramid_channels = width
        for number, level in enumerate(LEVELS, start=1):
            if level == LEVELS[-1]:
                self.add_module(f"layer_{number}", conv_norm(channels[level], width, 3, relu=True))
            else:
                self.add_module(f"adapter_{number}", conv_norm(channels[level], width, 1))
                self.add_module(f"layer_{number}", conv_norm(width, width, 3, relu=True))
        self.mask_features = mask_projection(width, width)

    def _layer(self, name: str) -> Conv2d:
        layer = self.get_submodule(name)
        assert isinstance(layer, Conv2d)
        return layer

    def forward(self, maps: dict[str, Tensor]) -> PixelFeatures:
        """See `PixelDecoder.forward`."""
        features = self._layer(f"layer_{len(LEVELS)}")(maps[LEVELS[-1]])
        pyramid = [features]
        for number in range(len(LEVELS) - 1, 0, -1):
            lateral = self._layer(f"adapter_{number}")(maps[LEVELS[number - 1]])
            features = self._layer(f"layer_{number}")(lateral + F.interpolate(features, size=lateral.shape[-2:], mode="nearest"))
            pyramid.append(features)
        return PixelFeatures(self.mask_features(features), (pyramid[0], pyramid[1], pyramid[2]))


@PIXEL_DECODERS.register("fpn")
def fpn(*, channels: dict[str, int], width: int) -> FPN:
    """Feature pyramid with one 3x3 convolution a level."""
    return FPN(channels=channels, width=width)
