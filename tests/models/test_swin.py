"""Swin: parity with transformers on copied weights, the original's names, windows, stochastic depth."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emca_bench.errors import UsageError
from emca_bench.measure.flops import count_macs
from emca_bench.models import build_model
from emca_bench.models.backbones import BACKBONES, LEVELS
from emca_bench.models.backbones.swin import SwinBlock, SwinTransformer, join_windows, shifted_window_mask, split_windows
from emca_bench.models.backbones.torchvision_shim import make_torchvision_importable
from emca_bench.specs import Arm

SIZES: dict[str, Any] = {"embed_dim": 16, "depths": (2, 2, 3, 2), "num_heads": (1, 2, 4, 8), "window_size": 4}

needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="the extra transformers is not installed")


def randomised(module: nn.Module) -> nn.Module:
    """Norms and biases away from the ones and zeros that hide a swap."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=0.02, std=0.2)
    return module


def published_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of transformers under the original's names."""
    renames = (
        (r"^swin\.embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        (r"^swin\.embeddings\.norm", "patch_embed.norm"),
        (r"^swin\.encoder\.", ""),
        (r"layernorm_before", "norm1"),
        (r"layernorm_after", "norm2"),
        (r"attention\.o_proj", "attn.proj"),
        (r"attention\.relative_position_bias\.", "attn."),
        (r"^hidden_states_norms\.stage(\d)", lambda match: f"norm{int(match[1]) - 1}"),
    )
    ours = {}
    for name, tensor in theirs.items():
        if name.startswith("swin.layernorm") or ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            tensor = torch.cat([theirs[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
            name = name.replace("attention.q_proj", "attn.qkv")
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        ours[name] = tensor
    return ours


@needs_transformers
@pytest.mark.parametrize("size", [(64, 96), (100, 67), (33, 35), (130, 61)], ids=str)
def test_maps_and_gradients_are_those_of_transformers(size: tuple[int, int]) -> None:
    make_torchvision_importable()
    import transformers

    config = transformers.SwinConfig(
        **{name: list(value) if isinstance(value, tuple) else value for name, value in SIZES.items()},
        out_features=["stage1", "stage2", "stage3", "stage4"],
        drop_path_rate=0.0,
    )
    theirs: Any = randomised(transformers.SwinBackbone(config)).double().eval()
    ours = SwinTransformer(**SIZES, drop_path_rate=0.3).double().eval()
    outcome = ours.load_state_dict(published_names(theirs.state_dict()), strict=False)
    assert not outcome.unexpected_keys
    assert all(name.endswith("relative_position_index") for name in outcome.missing_keys)

    images = torch.randn(2, 3, *size, dtype=torch.float64)
    found, wanted = ours(images), theirs(images).feature_maps
    for level, features in zip(LEVELS, wanted, strict=True):
        torch.testing.assert_close(found[level], features, rtol=1e-9, atol=1e-10)
    # maps end in a layer norm, whose plain sum of squares has a constant gradient
    for maps in (found.values(), wanted):
        sum((features * features.detach().sin()).sum() for features in maps).backward()
    gradients = published_names({name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None})
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        scale = float(gradients[name].abs().max())
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=1e-8, atol=1e-10 * scale, msg=lambda text, at=name: f"{at}: {text}"
        )


def test_names_are_the_original_s() -> None:
    block = {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"}
    block |= {f"attn.{name}" for name in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")}
    block |= {"attn.relative_position_bias_table", "attn.relative_position_index"}
    wanted = {f"patch_embed.{layer}.{part}" for layer in ("proj", "norm") for part in ("weight", "bias")}
    wanted |= {f"norm{stage}.{part}" for stage in range(4) for part in ("weight", "bias")}
    for stage, depth in enumerate(SIZES["depths"]):
        wanted |= {f"layers.{stage}.blocks.{index}.{name}" for index in range(depth) for name in block}
        if stage < 3:
            wanted |= {f"layers.{stage}.downsample.{name}" for name in ("reduction.weight", "norm.weight", "norm.bias")}
    state = SwinTransformer(**SIZES, drop_path_rate=0.0).state_dict()
    assert set(state) == wanted
    assert state["layers.1.blocks.0.attn.relative_position_bias_table"].shape == (49, 2)
    assert state["layers.1.blocks.0.attn.relative_position_index"].shape == (16, 16)


def test_one_bias_for_each_relative_position() -> None:
    index = SwinTransformer(**SIZES, drop_path_rate=0.0).state_dict()["layers.0.blocks.0.attn.relative_position_index"]
    entries: dict[tuple[int, int], int] = {}
    for one in range(16):
        for other in range(16):
            offset = (one // 4 - other // 4, one % 4 - other % 4)
            assert entries.setdefault(offset, int(index[one, other])) == index[one, other]
    assert sorted(entries.values()) == list(range(49))
    assert entries[-3, -3] == 0
    assert entries[-3, -2] == 1


def test_windows_go_row_by_row_and_back() -> None:
    features = torch.randn(2, 6, 9, 5)
    windows = split_windows(features, 3)
    assert windows.shape == (2, 6, 9, 5)
    torch.testing.assert_close(windows[1, 4].view(3, 3, 5), features[1, 3:6, 3:6])
    assert torch.equal(join_windows(windows, 3, columns=9), features)


def test_shifted_windows_keep_the_two_ends_of_the_map_apart() -> None:
    """A pixel reaches exactly those that share its shifted window on the map, not round its border."""
    size, window, shift = 8, 4, 2
    block = randomised(SwinBlock(8, heads=2, window=window, shift=shift, drop_path=0.0)).double()
    features = torch.randn(1, size, size, 8, dtype=torch.float64, requires_grad=True)
    updated = block(features, shifted_window_mask(features, window, shift))
    for row, column in ((0, 0), (0, 7), (3, 4), (7, 1)):
        (gradient,) = torch.autograd.grad(updated[0, row, column].sum(), features, retain_graph=True)
        reached = {(int(y), int(x)) for y, x in gradient[0].abs().sum(-1).gt(1e-12).nonzero()}
        bands = [range(2), range(2, 6), range(6, 8)]
        rows, columns = (next(band for band in bands if position in band) for position in (row, column))
        assert reached == {(y, x) for y in rows for x in columns}


def test_stochastic_depth_skips_whole_images_and_keeps_the_mean() -> None:
    block = randomised(SwinBlock(4, heads=1, window=2, shift=0, drop_path=0.25)).double()
    features = torch.randn(1, 2, 2, 4, dtype=torch.float64).expand(4000, -1, -1, -1)
    mask = shifted_window_mask(features, 2, 0)
    with torch.no_grad():
        branch = block.eval()._attend(block.norm1(features[:1]), mask)
        dropped = block.train()._dropped(branch.expand(4000, -1, -1, -1))
    ratio = (dropped / branch).flatten(1)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    assert set(ratio[:, 0].round(decimals=6).tolist()) == {0.0, round(1 / 0.75, 6)}
    assert abs(float(ratio.mean()) - 1) < 0.05


def test_stochastic_depth_grows_from_block_to_block() -> None:
    model = SwinTransformer(**SIZES, drop_path_rate=0.4)
    rates = [module.drop_path for module in model.modules() if isinstance(module, SwinBlock)]
    torch.testing.assert_close(rates, torch.linspace(0, 0.4, 9, dtype=torch.float64).tolist())
    images = torch.randn(1, 3, 32, 32)
    assert all(torch.equal(one, other) for one, other in zip(model.eval()(images).values(), model(images).values(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_heads": (1, 2, 3, 8)}, r"num_heads=\[1, 2, 3, 8\] must divide"), ({"drop_path_rate": 1.0}, "drop_path_rate=1.0 must be")],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SwinTransformer(**{**SIZES, "drop_path_rate": 0.0, **change})


@pytest.mark.parametrize(
    ("name", "window", "millions", "published_millions", "image_size", "gmacs", "published_gmacs"),
    [("swin_tiny", 7, 47.44, 47, "512x512", 69.6, 74), ("swin_large", 12, 215.5, 215, "640x640", 396.0, 403)],
)
def test_parameters_and_multiply_adds_against_the_published(
    name: str, window: int, millions: float, published_millions: int, image_size: str, gmacs: float, published_gmacs: int
) -> None:
    """Published figures (Mask2Former's model zoo, ADE20K semantic) are fvcore's, with semantic inference; torch's counter sees less."""
    params = {"model": f"mask2former_{name}", "image_size": image_size, "classes": 150, "batch": 1}
    masked = Arm(name="masked", attention="masked")
    counted = count_macs(masked, {"scope": "model", **params})
    assert counted["parameters"] / 1e6 == pytest.approx(millions, abs=0.05)
    assert counted["parameters"] / 1e6 == pytest.approx(published_millions, abs=0.6)
    assert counted["macs"] / 1e9 == pytest.approx(gmacs, rel=0.001)
    assert count_macs(masked, {"scope": "end_to_end", **params})["fvcore"]["macs"] / 1e9 == pytest.approx(published_gmacs, rel=0.01)
    with torch.device("meta"):
        backbone = BACKBONES[name]()
    assert isinstance(backbone, SwinTransformer)
    assert backbone.layers[0].window == window


def test_a_whole_model_learns_through_its_swin_backbone() -> None:
    model = build_model("mask2former_swin_tiny", num_classes=3, attention="masked", drop_path_rate=0.0, layers=1, encoder_layers=1)
    predictions = model(255 * torch.rand(1, 3, 40, 70))
    assert predictions.mask_logits.shape == (1, 100, 16, 24)
    predictions.mask_logits.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.backbone.parameters())
