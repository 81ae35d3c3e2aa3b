"""What a pixel decoder returns, and the registry of their names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from emca_bench.registry import Registry


class PixelFeatures(NamedTuple):
    """Maps for the mask decoder."""

    mask_features: Tensor
    """[B, C, H / 4, W / 4]: what mask embeddings are multiplied with."""
    pyramid: tuple[Tensor, Tensor, Tensor]
    """[B, channels, h, w] at strides 32, 16, 8: what queries attend to."""


class PixelDecoder(nn.Module, ABC):
    """Backbone maps to per-pixel embeddings.

    Attributes:
        pyramid_channels: of the maps that queries attend to.
    """

    pyramid_channels: int

    @abstractmethod
    def forward(self, maps: dict[str, Tensor]) -> PixelFeatures:
        """Maps [B, channels, h, w] by level, as a backbone returns them."""


PIXEL_DECODERS: Registry[Callable[..., PixelDecoder]] = Registry("pixel decoder")
