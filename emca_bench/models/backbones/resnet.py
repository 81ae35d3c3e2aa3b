"""ResNet with detectron2's parameter names, so that its checkpoints load without a map."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emca_bench.errors import UsageError, did_you_mean, listing
from emca_bench.models.backbones.base import BACKBONES, LEVELS, Backbone


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine are constants, as detectron2 keeps them: four buffers, nothing trained."""

    EPS = 1e-5

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, h, w] to the same shape."""
        return F.batch_norm(features, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.EPS)


Norm = Callable[[int], nn.Module]


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with groups of eight channels at least, at most 32 groups: for training from scratch at small batches."""
    return nn.GroupNorm(min(32, channels // 8), channels)


NORMS: dict[str, Norm] = {"frozen": FrozenBatchNorm2d, "batch": nn.BatchNorm2d, "group": group_norm}


class Conv2d(nn.Conv2d):
    """Convolution with its norm as the child `norm`, and an optional ReLU behind: detectron2's layout."""

    def __init__(self, source: int, target: int, kernel: int, *, norm: Norm | None, stride: int = 1, relu: bool = False) -> None:
        super().__init__(source, target, kernel, stride=stride, padding=kernel // 2, bias=norm is None)
        if norm is not None:
            self.norm = norm(target)
        self.relu = relu

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, h, w] to [B, C', h', w']."""
        features = super().forward(input)
        if hasattr(self, "norm"):
            features = self.norm(features)
        return F.relu(features) if self.relu else features


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or 1x1, 3x3, 1x1 with the stride in the 3x3."""

    def __init__(self, source: int, target: int, *, bottleneck: int | None, stride: int, norm: Norm) -> None:
        super().__init__()
        if stride != 1 or source != target:
            self.shortcut = Conv2d(source, target, 1, norm=norm, stride=stride)
        if bottleneck is None:
            self.conv1 = Conv2d(source, target, 3, norm=norm, stride=stride, relu=True)
            self.conv2 = Conv2d(target, target, 3, norm=norm)
        else:
            self.conv1 = Conv2d(source, bottleneck, 1, norm=norm, relu=True)
            self.conv2 = Conv2d(bottleneck, bottleneck, 3, norm=norm, stride=stride, relu=True)
            self.conv3 = Conv2d(bottleneck, target, 1, norm=norm)

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, h, w] to [B, C', h / stride, w / stride]."""
        update = self.conv2(self.conv1(features))
        if hasattr(self, "conv3"):
            update = self.conv3(update)
        return F.relu(update + (self.shortcut(features) if hasattr(self, "shortcut") else features))


class Stem(nn.Module):
    """7x7 convolution and max pooling, to stride 4."""

    def __init__(self, width: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = Conv2d(3, width, 7, norm=norm, stride=2, relu=True)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, C, H / 4, W / 4]."""
        return F.max_pool2d(self.conv1(images), 3, stride=2, padding=1)


class ResNet(Backbone):
    """Residual network.

    Source: He et al., 2015; stride in the 3x3 convolution as torchvision and Mask2Former have it.

    Args:
        blocks: residual blocks of each of the four stages.
        stem_width: channels of the stem; stages have 1, 2, 4, 8 times that, and four times as many outputs with bottlenecks.
        bottleneck: whether blocks have bottlenecks (50 layers and more).
        norm: "frozen" (constants from a checkpoint), "batch" or "group".
    """

    def __init__(self, *, blocks: tuple[int, int, int, int], stem_width: int, bottleneck: bool, norm: str) -> None:
        super().__init__()
        if norm not in NORMS:
            raise UsageError(f"norm={norm!r}{did_you_mean(norm, NORMS)}; expected one of {listing(NORMS)}")
        make_norm = NORMS[norm]
        self.stem = Stem(stem_width, make_norm)
        source = stem_width
        self.channels = {}
        for stage, (level, count) in enumerate(zip(LEVELS, blocks, strict=True)):
            inner = stem_width * 2**stage
            target = inner * 4 if bottleneck else inner
            layers = []
            for index in range(count):
                stride = 2 if index == 0 and stage > 0 else 1
                layers.append(Block(source, target, bottleneck=inner if bottleneck else None, stride=stride, norm=make_norm))
                source = target
            self.add_module(level, nn.Sequential(*layers))
            self.channels[level] = target
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See `Backbone.forward`."""
        features = self.stem(images)
        maps = {}
        for level in LEVELS:
            features = self.get_submodule(level)(features)
            maps[level] = features
        return maps


@BACKBONES.register("resnet50")
def resnet50(*, norm: str = "frozen") -> ResNet:
    """ResNet-50, 23.5 M parameters and buffers."""
    return ResNet(blocks=(3, 4, 6, 3), stem_width=64, bottleneck=True, norm=norm)


@BACKBONES.register("resnet18")
def resnet18(*, norm: str = "frozen") -> ResNet:
    """ResNet-18."""
    return ResNet(blocks=(2, 2, 2, 2), stem_width=64, bottleneck=False, norm=norm)


@BACKBONES.register("resnet10_quarter")
def resnet10_quarter(*, norm: str = "group") -> ResNet:
    """One block a stage and a quarter of the channels: to train from scratch on a CPU in a minute."""
    return ResNet(blocks=(1, 1, 1, 1), stem_width=16, bottleneck=False, norm=norm)
