"""What a backbone returns, and the registry of their names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

from emca_bench.registry import Registry

LEVELS = ("res2", "res3", "res4", "res5")
"""Feature maps at strides 4, 8, 16, 32, under detectron2's names."""


class Backbone(nn.Module, ABC):
    """Images to feature maps.

    Attributes:
        channels: width of each level.
        pretrained: whether it started from weights of another task.
        pixel_mean, pixel_std: RGB statistics in 0..255 that its weights expect.
    """

    channels: dict[str, int]
    pretrained: bool = False
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)

    @abstractmethod
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images [B, 3, H, W], H and W multiples of 32, to maps [B, channels, H / stride, W / stride] by level."""


BACKBONES: Registry[Callable[..., Backbone]] = Registry("backbone")
