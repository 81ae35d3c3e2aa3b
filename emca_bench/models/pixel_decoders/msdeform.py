"""Mask2Former's pixel decoder: deformable attention over strides 32, 16, 8, then one feature-pyramid step to stride 4."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from emca_kernels import deformable_attention
from torch import Tensor, nn

from emca_bench.models.backbones.base import LEVELS
from emca_bench.models.pixel_decoders.base import PIXEL_DECODERS, PixelDecoder, PixelFeatures
from emca_bench.models.pixel_decoders.layers import conv_norm, group_norm32, mask_projection, upsample_to
from emca_bench.models.position import sine_position

TRANSFORMER_LEVELS = ("res5", "res4", "res3")


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with its projections.

    Source: Zhu et al., Deformable DETR, 2021, equation 3.
    """

    def __init__(self, *, width: int, levels: int, heads: int, points: int) -> None:
        super().__init__()
        self.levels, self.heads, self.points = levels, heads, points
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        angle = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        direction_M2 = torch.stack([angle.cos(), angle.sin()], -1)
        # onto the border of the unit square, one pixel further for each point
        direction_M2 = direction_M2 / direction_M2.abs().amax(-1, keepdim=True)
        step_N = torch.arange(1, self.points + 1, dtype=torch.float32)
        offset_MLN2 = (direction_M2[:, None, None] * step_N[:, None]).expand(-1, self.levels, -1, -1)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offset_MLN2.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, queries_BPC: Tensor, reference_P2: Tensor, values_BPC: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """[B, P, C] updates; reference points are (x, y) in 0..1, `shapes` the (h, w) of the levels in `values_BPC`."""
        parts = (self.heads, self.levels, self.points)
        offsets_BPMLN2 = self.sampling_offsets(queries_BPC).unflatten(-1, (*parts, 2))
        weights_BPMLN = self.attention_weights(queries_BPC).unflatten(-1, (self.heads, -1)).softmax(-1).unflatten(-1, parts[1:])
        size_L2 = torch.tensor([(columns, rows) for rows, columns in shapes], dtype=queries_BPC.dtype, device=queries_BPC.device)
        locations = reference_P2[:, None, None, None] + offsets_BPMLN2 / size_L2[:, None]
        values_BPMd = self.value_proj(values_BPC).unflatten(-1, (self.heads, -1))
        return self.output_proj(deformable_attention(values_BPMd, shapes, locations, weights_BPMLN))


class EncoderLayer(nn.Module):
    """Deformable self-attention over all levels, then a feed-forward network; post-norm."""

    def __init__(self, *, width: int, feedforward: int, levels: int, heads: int, points: int) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(width=width, levels=levels, heads=heads, points=points)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, feedforward)
        self.linear2 = nn.Linear(feedforward, width)
        self.norm2 = nn.LayerNorm(width)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, tokens: Tensor, position: Tensor, reference: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """[B, P, C] tokens of all levels to the same shape."""
        tokens = self.norm1(tokens + self.self_attn(tokens + position, reference, tokens, shapes))
        return self.norm2(tokens + self.linear2(F.relu(self.linear1(tokens))))


class Encoder(nn.Module):
    """The stack of encoder layers under the original's names."""

    def __init__(self, *, layers: int, width: int, feedforward: int, levels: int, heads: int, points: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(width=width, feedforward=feedforward, levels=levels, heads=heads, points=points) for _ in range(layers)
        )


class DeformableTransformer(nn.Module):
    """Level embedding and encoder."""

    def __init__(self, *, layers: int, width: int, feedforward: int, levels: int, heads: int, points: int) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.randn(levels, width))
        self.encoder = Encoder(layers=layers, width=width, feedforward=feedforward, levels=levels, heads=heads, points=points)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps [B, C, h, w], coarse to fine, to maps of the same shapes."""
        shapes = [(int(level.shape[-2]), int(level.shape[-1])) for level in maps]
        tokens = torch.cat([level.flatten(2).mT for level in maps], 1)
        position = torch.cat(
            [
                sine_position(shape, tokens.shape[-1], device=tokens.device, dtype=tokens.dtype) + embed
                for shape, embed in zip(shapes, self.level_embed, strict=True)
            ]
        )
        reference = torch.cat([_pixel_centres(shape, tokens) for shape in shapes])
        for layer in self.encoder.layers:
            tokens = layer(tokens, position, reference, shapes)
        parts = tokens.split([rows * columns for rows, columns in shapes], dim=1)
        return [part.mT.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]


def _pixel_centres(shape: tuple[int, int], like: Tensor) -> Tensor:
    """(x, y) in 0..1 of each pixel, row by row: [h * w, 2]."""
    y, x = ((torch.arange(size, device=like.device, dtype=like.dtype) + 0.5) / size for size in shape)
    return torch.stack([x.expand(shape[0], -1), y[:, None].expand(-1, shape[1])], -1).flatten(0, 1)


class MSDeformAttnPixelDecoder(PixelDecoder):
    """Six deformable encoder layers and one feature-pyramid step.

    Source: Cheng et al., Mask2Former, 2022; parameter names of facebookresearch/Mask2Former.

    Args:
        channels: of the backbone by level.
        width: C of the maps and mask features.
        layers, heads, points, feedforward: of the deformable encoder.
    """

    def __init__(
        self, *, channels: dict[str, int], width: int, layers: int = 6, heads: int = 8, points: int = 4, feedforward: int = 1024
    ) -> None:
        super().__init__()
        self.pyramid_channels = width
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels[level], width, 1), group_norm32(width)) for level in TRANSFORMER_LEVELS
        )
        for projection in self.input_proj:
            nn.init.xavier_uniform_(projection[0].weight)  # type: ignore[index]
            nn.init.zeros_(projection[0].bias)  # type: ignore[index]
        self.transformer = DeformableTransformer(
            layers=layers, width=width, feedforward=feedforward, levels=len(TRANSFORMER_LEVELS), heads=heads, points=points
        )
        self.mask_features = mask_projection(width, width)
        self.adapter_1 = conv_norm(channels[LEVELS[0]], width, 1)
        self.layer_1 = conv_norm(width, width, 3, relu=True)

    def forward(self, maps: dict[str, Tensor]) -> PixelFeatures:
        """See `PixelDecoder.forward`."""
        projected = [projection(maps[level]) for projection, level in zip(self.input_proj, TRANSFORMER_LEVELS, strict=True)]
        coarse, middle, fine = self.transformer(projected)
        lateral = self.adapter_1(maps[LEVELS[0]])
        stride4 = self.layer_1(lateral + upsample_to(fine, lateral))
        return PixelFeatures(self.mask_features(stride4), (coarse, middle, fine))


@PIXEL_DECODERS.register("msdeform")
def msdeform(*, channels: dict[str, int], width: int, encoder_layers: int = 6) -> MSDeformAttnPixelDecoder:
    """Mask2Former's own."""
    return MSDeformAttnPixelDecoder(channels=channels, width=width, layers=encoder_layers)
