"""Mask2Former's pixel decoder: deformable attention over strides 32, 16, 8, then one feature-pyramid step to stride 4."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from emca_kernels import deformable_attention_from_offsets
from torch import Tensor, nn

from emca_bench.models.backbones.base import LEVELS
from emca_bench.models.pixel_decoders.base import PIXEL_DECODERS, PixelDecoder, PixelFeatures
from emca_bench.models.pixel_decoders.layers import conv_norm, group_norm32, mask_projection, upsample_to
from emca_bench.models.position import sine_position
from emca_bench.models.projection import infers_on_cpu, project

TRANSFORMER_LEVELS = ("res5", "res4", "res3")

BLOCK_TOKENS = 1024
"""Tokens that go through an encoder layer at a time in inference on a CPU: what lies between its operators stays in the caches."""

Shapes = list[tuple[int, int]]


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

    def forward(self, queries_BPC: Tensor, reference_P2: Tensor, values_BPC: Tensor, shapes: Shapes) -> Tensor:
        """[B, P, C] updates; reference points are (x, y) in 0..1, `shapes` the (h, w) of the levels in `values_BPC`."""
        return self.attend(queries_BPC, reference_P2, self.values(values_BPC), shapes)

    def values(self, values_BPC: Tensor) -> Tensor:
        """Projected values [B, P, M, d] of all pixels."""
        return project(self.value_proj, values_BPC).unflatten(-1, (self.heads, -1))

    def attend(self, queries_BQC: Tensor, reference_Q2: Tensor, values_BPMd: Tensor, shapes: Shapes) -> Tensor:
        """[B, Q, C] updates of any of the queries."""
        parts = (self.heads, self.levels, self.points)
        offsets_BQMLN2 = project(self.sampling_offsets, queries_BQC).unflatten(-1, (*parts, 2))
        logits_BQMLN = project(self.attention_weights, queries_BQC).unflatten(-1, parts)
        sampled_BQC = deformable_attention_from_offsets(values_BPMd, shapes, reference_Q2, offsets_BQMLN2, logits_BQMLN)
        return project(self.output_proj, sampled_BQC)


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

    def forward(self, tokens: Tensor, position: Tensor, reference: Tensor, shapes: Shapes) -> Tensor:
        """[B, P, C] tokens of all levels to the same shape."""
        values = self.self_attn.values(tokens)
        if not infers_on_cpu(tokens):
            return self.update(tokens, position, reference, values, shapes)
        updated = torch.empty_like(tokens)
        for image in range(len(tokens)):
            one = slice(image, image + 1)
            for start in range(0, tokens.shape[1], BLOCK_TOKENS):
                block = slice(start, start + BLOCK_TOKENS)
                updated[one, block] = self.update(tokens[one, block], position[block], reference[block], values[one], shapes)
        return updated

    def update(self, tokens: Tensor, position: Tensor, reference: Tensor, values: Tensor, shapes: Shapes) -> Tensor:
        """Any of the tokens [B, P', C] with their position and reference points; values [B, P, M, d] are those of all."""
        tokens = self.norm1(tokens + self.self_attn.attend(tokens + position, reference, values, shapes))
        return self.norm2(tokens + project(self.linear2, project(self.linear1, tokens).relu_()))


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
        sine, reference = _constants(tuple(shapes), tokens)
        parts = sine.split([rows * columns for rows, columns in shapes])
        position = torch.cat([part + embed for part, embed in zip(parts, self.level_embed, strict=True)])
        for layer in self.encoder.layers:
            tokens = layer(tokens, position, reference, shapes)
        parts = tokens.split([rows * columns for rows, columns in shapes], dim=1)
        return [part.mT.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True)]


def _constants(shapes: tuple[tuple[int, int], ...], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Sine positions [P, C], without the embedding of the level, and pixel centres [P, 2]; kept for images of the same size."""
    # a compiler's tensors, and others without values, are not for keeping
    keeps = type(tokens) is Tensor and not torch.compiler.is_compiling()
    make = _make_constants if keeps else _make_constants.__wrapped__
    return make(shapes, tokens.shape[-1], tokens.device, tokens.dtype)


# two sizes, so that a landscape and its portrait both stay: at 1024x2048 each takes 44 MB
@lru_cache(maxsize=2)
def _make_constants(shapes: tuple[tuple[int, int], ...], width: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # kept tensors may be used in training later
    with torch.inference_mode(False), torch.no_grad():
        sine = torch.cat([sine_position(shape, width, device=device, dtype=dtype) for shape in shapes])
        return sine, torch.cat([pixel_centres(shape, device, dtype) for shape in shapes])


def pixel_centres(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """(x, y) in 0..1 of each pixel, row by row: [h * w, 2], in float32 at least."""
    exact = torch.promote_types(dtype, torch.float32)
    y, x = ((torch.arange(size, device=device, dtype=exact) + 0.5) / size for size in shape)
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
