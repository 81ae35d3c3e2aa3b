"""Pixel decoders: how levels are joined, and what the deformable encoder is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emca_bench.models.backbones import LEVELS
from emca_bench.models.pixel_decoders import PIXEL_DECODERS, msdeform
from emca_bench.models.pixel_decoders.fpn import FPN
from emca_bench.models.pixel_decoders.msdeform import EncoderLayer, MSDeformAttnPixelDecoder
from emca_bench.models.position import sine_position
from emca_bench.models.projection import project

CHANNELS = dict(zip(LEVELS, (4, 6, 10, 12), strict=True))
WIDTH, SIZES = 16, [(24, 40), (12, 20), (6, 10), (3, 5)]


def make_maps() -> dict[str, Tensor]:
    return {level: torch.randn(2, CHANNELS[level], *size, dtype=torch.float64) for level, size in zip(LEVELS, SIZES, strict=True)}


class Recorder(nn.Module):
    """An encoder layer that changes nothing and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Any] = {}

    def forward(self, tokens: Tensor, position: Tensor, reference: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        self.seen = {"tokens": tokens, "position": position, "reference": reference, "shapes": shapes}
        return tokens


@pytest.mark.parametrize("name", PIXEL_DECODERS)
def test_maps_at_strides_32_16_8_and_mask_features_at_4(name: str) -> None:
    decoder = PIXEL_DECODERS[name](channels=CHANNELS, width=WIDTH).double()
    mask_features, pyramid = decoder(make_maps())
    assert mask_features.shape == (2, WIDTH, *SIZES[0])
    assert [tuple(level.shape) for level in pyramid] == [(2, decoder.pyramid_channels, *size) for size in SIZES[:0:-1]]


@pytest.mark.parametrize("name", PIXEL_DECODERS)
def test_every_level_reaches_the_mask_features_and_every_parameter_learns(name: str) -> None:
    decoder = PIXEL_DECODERS[name](channels=CHANNELS, width=WIDTH).double()
    # sampling starts where no query has a say, and so no position
    for parameter in decoder.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    maps = {level: features.requires_grad_() for level, features in make_maps().items()}
    mask_features, pyramid = decoder(maps)
    sum((features * torch.randn_like(features)).sum() for features in (mask_features, *pyramid)).backward()
    for path, parameter in decoder.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
        assert parameter.grad.any(), path
    (gradient,) = torch.autograd.grad(decoder(maps)[0].square().sum(), maps["res5"])
    assert gradient.any()


def test_the_feature_pyramid_adds_top_down() -> None:
    decoder = FPN(channels=CHANNELS, width=WIDTH).double()
    maps, layer = make_maps(), decoder.get_submodule
    stride32 = layer("layer_4")(maps["res5"])
    stride16 = layer("layer_3")(layer("adapter_3")(maps["res4"]) + stride32.repeat_interleave(2, 2).repeat_interleave(2, 3))
    stride8 = layer("layer_2")(layer("adapter_2")(maps["res3"]) + stride16.repeat_interleave(2, 2).repeat_interleave(2, 3))
    stride4 = layer("layer_1")(layer("adapter_1")(maps["res2"]) + stride8.repeat_interleave(2, 2).repeat_interleave(2, 3))
    mask_features, pyramid = decoder(maps)
    for found, wanted in zip((*pyramid, mask_features), (stride32, stride16, stride8, decoder.mask_features(stride4)), strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_deformable_encoder_sees_all_pixels_with_position_level_and_centre() -> None:
    decoder = MSDeformAttnPixelDecoder(channels=CHANNELS, width=WIDTH, layers=0).double()
    recorder = Recorder()
    decoder.transformer.encoder.layers.append(recorder)
    maps = make_maps()
    mask_features, pyramid = decoder(maps)
    coarse_to_fine = list(zip(LEVELS[:0:-1], SIZES[:0:-1], strict=True))
    projected = [projection(maps[level]) for projection, (level, _) in zip(decoder.input_proj, coarse_to_fine, strict=True)]
    start = 0
    for index, (rows, columns) in enumerate(size for _, size in coarse_to_fine):
        part = slice(start, start + rows * columns)
        torch.testing.assert_close(recorder.seen["tokens"][:, part], projected[index].flatten(2).mT)
        position = sine_position((rows, columns), WIDTH, dtype=torch.float64) + decoder.transformer.level_embed[index]
        torch.testing.assert_close(recorder.seen["position"][part], position)
        centres = [((column + 0.5) / columns, (row + 0.5) / rows) for row in range(rows) for column in range(columns)]
        torch.testing.assert_close(recorder.seen["reference"][part], torch.tensor(centres, dtype=torch.float64))
        torch.testing.assert_close(pyramid[index], projected[index])
        start += rows * columns
    assert recorder.seen["shapes"] == [size for _, size in coarse_to_fine]
    finest = F.interpolate(projected[-1], size=SIZES[0], mode="bilinear", align_corners=False)
    torch.testing.assert_close(mask_features, decoder.mask_features(decoder.layer_1(decoder.adapter_1(maps["res2"]) + finest)))


def test_an_encoder_layer_adds_positions_to_its_queries_alone() -> None:
    layer = EncoderLayer(width=WIDTH, feedforward=24, levels=1, heads=2, points=2).double()
    nn.init.normal_(layer.self_attn.sampling_offsets.weight)
    nn.init.normal_(layer.self_attn.attention_weights.weight)
    tokens, position = torch.randn(2, 15, WIDTH, dtype=torch.float64), torch.randn(15, WIDTH, dtype=torch.float64)
    reference, shapes = torch.rand(15, 2, dtype=torch.float64), [(3, 5)]
    attended = layer.norm1(tokens + layer.self_attn(tokens + position, reference, tokens, shapes))
    wanted = layer.norm2(attended + layer.linear2(layer.linear1(attended).clamp(min=0)))
    torch.testing.assert_close(layer(tokens, position, reference, shapes), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_in_blocks_of_tokens_is_the_plain_layer(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks end within levels; images do not mix."""
    monkeypatch.setattr(msdeform, "BLOCK_TOKENS", 7)
    decoder = MSDeformAttnPixelDecoder(channels=CHANNELS, width=WIDTH, layers=2).to(dtype)
    for layer in decoder.transformer.encoder.layers:
        nn.init.normal_(layer.self_attn.sampling_offsets.weight, std=0.1)
        nn.init.normal_(layer.self_attn.attention_weights.weight)
    maps = {level: features.to(dtype) for level, features in make_maps().items()}
    wanted = decoder(maps)
    assert wanted.mask_features.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = decoder(maps)
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        for one, other in zip((found[0], *found[1]), (wanted[0], *wanted[1]), strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_constants_are_made_once_per_size_and_serve_training_after_inference() -> None:
    decoder = MSDeformAttnPixelDecoder(channels=CHANNELS, width=WIDTH, layers=1).float()
    maps = {level: features.float() for level, features in make_maps().items()}
    msdeform._make_constants.cache_clear()
    with torch.inference_mode():
        decoder(maps)
        decoder(maps)
    assert msdeform._make_constants.cache_info()[:2] == (1, 1)
    decoder(maps)[0].sum().backward()
    with torch.inference_mode():
        decoder({level: features[..., : features.shape[-1] // 2] for level, features in maps.items()})
    assert msdeform._make_constants.cache_info().misses == 2


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("images", "count", "whole"), [(2, 7, True), (1, 1, True), (0, 7, True), (2, 7, False)])
def test_a_projection_is_a_linear_layer(images: int, count: int, whole: bool, bias: bool) -> None:
    linear = nn.Linear(12, 5, bias=bias)
    tokens = torch.randn(images, count, 12) if whole else torch.randn(images, 12, count).mT
    with torch.no_grad():
        found = project(linear, tokens)
    assert found.shape == (*tokens.shape[:2], 5)
    assert found.is_contiguous()
    torch.testing.assert_close(found, linear(tokens))
    project(linear, tokens).sum().backward()
    assert linear.weight.grad is not None
