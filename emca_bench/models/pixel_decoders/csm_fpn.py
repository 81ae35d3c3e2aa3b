"""PEM's pixel decoder: a feature pyramid with gates from global context, deformable convolutions and learned upsampling.

Written from the published description; parameter names are those of PEM's checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from emca_kernels import deformable_conv
from torch import Tensor, nn

from emca_bench.errors import UsageError, did_you_mean
from emca_bench.models.backbones.base import LEVELS
from emca_bench.models.pixel_decoders.base import PIXEL_DECODERS, PixelDecoder, PixelFeatures

UPSAMPLE_INITS = ("bilinear", "first_channel")
TAPS = 9


class ConvBNReLU(nn.Module):
    """1x1 convolution, batch norm, ReLU."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(source, target, 1, bias=False)
        self.bn = nn.BatchNorm2d(target)

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, h, w] to [B, C', h, w]."""
        return F.relu(self.bn(self.conv(features)))


class Bottleneck(nn.Module):
    """Two 1x1 convolutions with half the channels between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(width, width // 2, 1, bias=False),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 1, bias=False),
        )

    def forward(self, context: Tensor) -> Tensor:
        """[B, C, 1, 1] to the same shape."""
        return self.mlp(context)


class CSM(nn.Module):
    """Context-based self-modulation: x + gate * x, with a gate per channel from the mean of the map.

    Args:
        width: C.
        double_sigmoid: the gate passes a second sigmoid, as in PEM's code, and so lies in 0.5..0.73 instead of 0..1.
    """

    def __init__(self, width: int, *, double_sigmoid: bool) -> None:
        super().__init__()
        self.double_sigmoid = double_sigmoid
        self.mlp = nn.Sequential(Bottleneck(width), nn.Sigmoid())

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, h, w] to the same shape."""
        gate = self.mlp(features.mean((-2, -1), keepdim=True))
        if self.double_sigmoid:
            gate = gate.sigmoid()
        return features + features * gate


class ModulatedDeformConv(nn.Module):
    """Holds the weight of a 3x3 modulated deformable convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width, 3, 3))
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def forward(self, features: Tensor, offsets: Tensor, masks: Tensor) -> Tensor:
        """[B, C, h, w] to the same shape."""
        return deformable_conv(features, offsets, masks, self.weight, padding=1)


class DeformLayer(nn.Module):
    """Modulated deformable convolution, then a transposed one to twice the size.

    Args:
        width: C.
        upsample_init: "bilinear": every channel starts as its own bilinear upsampling. "first_channel" is PEM's: the bilinear kernel
            from every channel into the first, all else random.
    """

    def __init__(self, width: int, *, upsample_init: str) -> None:
        super().__init__()
        self.dcn_offset = nn.Conv2d(width, 3 * TAPS, 3, padding=1)
        self.dcn = ModulatedDeformConv(width)
        self.dcn_bn = nn.BatchNorm2d(width)
        self.up_sample = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1, bias=False)
        self.up_bn = nn.BatchNorm2d(width)
        nn.init.zeros_(self.dcn_offset.weight)
        nn.init.zeros_(self.dcn_offset.bias)  # type: ignore[arg-type]
        self._reset_upsampling(upsample_init)

    @torch.no_grad()
    def _reset_upsampling(self, upsample_init: str) -> None:
        ramp = torch.tensor([0.25, 0.75, 0.75, 0.25])
        kernel = ramp[:, None] * ramp
        weight_IOyx = self.up_sample.weight
        if upsample_init == "first_channel":
            weight_IOyx[:, 0] = kernel
        else:
            weight_IOyx.copy_(torch.eye(len(weight_IOyx))[..., None, None] * kernel)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, h, w] to the convolved map and, from it, one of twice the size."""
        moves = self.dcn_offset(features)
        convolved = self.dcn(features, moves[:, : 2 * TAPS], moves[:, 2 * TAPS :].sigmoid())
        convolved = F.relu(self.dcn_bn(convolved))
        return convolved, F.relu(self.up_bn(self.up_sample(convolved)))


class CSMFPN(PixelDecoder):
    """Top-down feature pyramid of PEM.

    Source: Cavagnero et al., PEM: Prototype-based Efficient MaskFormer, CVPR 2024.

    Args:
        channels: of the backbone by level.
        width: C of the mask features.
        conv_width: channels inside, and of the maps that it returns.
        double_sigmoid: see `CSM`; checkpoints that PEM's code trained need True.
        upsample_init: see `DeformLayer`.
    """

    def __init__(self, *, channels: dict[str, int], width: int, conv_width: int, double_sigmoid: bool, upsample_init: str) -> None:
        super().__init__()
        if upsample_init not in UPSAMPLE_INITS:
            raise UsageError(
                f"upsample_init={upsample_init!r}{did_you_mean(upsample_init, UPSAMPLE_INITS)}; expected one of {', '.join(UPSAMPLE_INITS)}"
            )
        self.pyramid_channels = conv_width
        self.in_projections = nn.ModuleList(ConvBNReLU(channels[level], conv_width) for level in LEVELS)
        self.conv_avg = ConvBNReLU(channels[LEVELS[-1]], conv_width)
        self.csm = nn.ModuleList(CSM(conv_width, double_sigmoid=double_sigmoid) for _ in LEVELS)
        self.dcn = nn.ModuleList(DeformLayer(conv_width, upsample_init=upsample_init) for _ in LEVELS[1:])
        self.out = ConvBNReLU(conv_width, width)

    def forward(self, maps: dict[str, Tensor]) -> PixelFeatures:
        """See `PixelDecoder.forward`; its maps have `conv_width` channels.

        Raises:
            UsageError: a single image in training mode, whose global context has one value a channel to normalise.
        """
        coarsest = maps[LEVELS[-1]]
        if self.training and len(coarsest) == 1 and isinstance(self.conv_avg.bn, nn.BatchNorm2d):
            raise UsageError("pixel decoder 'csm_fpn' trains its batch norms on global context: found 1 image a batch, expected 2 or more")
        lateral = [projection(maps[level]) for projection, level in zip(self.in_projections, LEVELS, strict=True)]
        upper = self.conv_avg(coarsest.mean((-2, -1), keepdim=True))
        pyramid = []
        for csm, deform, features in zip(self.csm, self.dcn, lateral[:0:-1], strict=False):
            convolved, upper = deform(csm(features) + upper)
            pyramid.append(convolved)
        mask_features = self.out(self.csm[-1](lateral[0]) + upper)
        return PixelFeatures(mask_features, (pyramid[0], pyramid[1], pyramid[2]))


@PIXEL_DECODERS.register("csm_fpn")
def csm_fpn(
    *, channels: dict[str, int], width: int, conv_width: int = 128, double_sigmoid: bool = False, upsample_init: str = "bilinear"
) -> CSMFPN:
    """PEM's own, with the two defects of its code mended unless asked for."""
    return CSMFPN(channels=channels, width=width, conv_width=conv_width, double_sigmoid=double_sigmoid, upsample_init=upsample_init)
