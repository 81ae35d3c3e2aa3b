"""PEM's light model: its pixel decoder piece by piece, the names of its checkpoints, its size and its arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emca_bench.errors import UsageError
from emca_bench.measure.flops import count_macs
from emca_bench.models import build_model
from emca_bench.models.attention.emca import EMCA
from emca_bench.models.backbones import LEVELS
from emca_bench.models.mask2former import Mask2Former
from emca_bench.models.pixel_decoders.csm_fpn import CSM, CSMFPN, DeformLayer
from emca_bench.specs import Arm

CHANNELS = dict(zip(LEVELS, (4, 6, 10, 12), strict=True))
SIZES = [(24, 40), (12, 20), (6, 10), (3, 5)]


@pytest.fixture(scope="module")
def pem() -> Mask2Former:
    """The published model without memory or values."""
    with torch.device("meta"):
        return build_model("pem_r50", num_classes=150).eval()


def make(**changes: Any) -> CSMFPN:
    options: dict[str, Any] = {"conv_width": 8, "double_sigmoid": False, "upsample_init": "bilinear", **changes}
    decoder = CSMFPN(channels=CHANNELS, width=16, **options).double()
    for module in decoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return decoder.eval()


def make_maps(batch: int = 2) -> dict[str, Tensor]:
    return {level: torch.randn(batch, CHANNELS[level], *size, dtype=torch.float64) for level, size in zip(LEVELS, SIZES, strict=True)}


@pytest.mark.parametrize("double_sigmoid", [True, False])
def test_the_pixel_decoder_is_what_is_published(double_sigmoid: bool) -> None:
    """With offsets at their start a deformable convolution is a plain one with half the weight."""
    decoder, maps = make(double_sigmoid=double_sigmoid, upsample_init="first_channel"), make_maps()
    state = decoder.state_dict()

    def norm(name: str, features: Tensor) -> Tensor:
        parts = (state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias"))
        mean, variance, weight, bias = parts
        return (features - mean) / (variance + 1e-5).sqrt() * weight + bias

    def project(name: str, features: Tensor) -> Tensor:
        return norm(f"{name}.bn", torch.einsum("oc,bchw->bohw", state[f"{name}.conv.weight"][..., 0, 0], features)).clamp(min=0)

    def modulate(index: int, features: Tensor) -> Tensor:
        name = f"csm.{index}.mlp.0.mlp"
        hidden = norm(f"{name}.1", F.conv2d(features.mean((2, 3), keepdim=True), state[f"{name}.0.weight"])).clamp(min=0)
        gate = 1 / (1 + (-F.conv2d(hidden, state[f"{name}.3.weight"])).exp())
        return features * (1 + (1 / (1 + (-gate).exp()) if double_sigmoid else gate))

    def deform(index: int, features: Tensor) -> tuple[Tensor, Tensor]:
        name = f"dcn.{index}"
        convolved = norm(f"{name}.dcn_bn", F.conv2d(features, state[f"{name}.dcn.weight"], padding=1) / 2).clamp(min=0)
        upsampled = F.conv_transpose2d(convolved, state[f"{name}.up_sample.weight"], stride=2, padding=1)
        return convolved, norm(f"{name}.up_bn", upsampled).clamp(min=0)

    stride4, stride8, stride16, stride32 = (project(f"in_projections.{index}", maps[level]) for index, level in enumerate(LEVELS))
    coarse, up = deform(0, modulate(0, stride32) + project("conv_avg", maps["res5"].mean((2, 3), keepdim=True)))
    middle, up = deform(1, modulate(1, stride16) + up)
    fine, up = deform(2, modulate(2, stride8) + up)
    mask_features, pyramid = decoder(maps)
    for found, wanted in zip(pyramid, (coarse, middle, fine), strict=True):
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(mask_features, project("out", modulate(3, stride4) + up))


def test_offsets_and_masks_come_from_the_first_18_and_the_last_9_channels() -> None:
    layer = DeformLayer(4, upsample_init="bilinear").double().eval()
    features = torch.randn(2, 4, 5, 6, dtype=torch.float64).clamp(min=0)
    with torch.no_grad():
        layer.dcn.weight.zero_()
        layer.dcn.weight[range(4), range(4), 1, 1] = 1
        # the middle tap looks one row down and two columns left, at full strength
        layer.dcn_offset.bias[8], layer.dcn_offset.bias[9], layer.dcn_offset.bias[18 + 4] = 1.0, -2.0, 50.0
        convolved, _ = layer(features)
    wanted = F.pad(features, (2, 0, 0, 1))[:, :, 1:, :6] / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(convolved, wanted)


@pytest.mark.parametrize(("double_sigmoid", "low", "high"), [(False, 0.0, 1.0), (True, 0.5, 0.7311)])
def test_the_second_sigmoid_narrows_the_gate(double_sigmoid: bool, low: float, high: float) -> None:
    csm = CSM(8, double_sigmoid=double_sigmoid).eval()
    for parameter in csm.parameters():
        nn.init.normal_(parameter, std=3)
    features = torch.randn(200, 8, 1, 1) * 5
    with torch.no_grad():
        gate = (csm(features) / features - 1)[features.abs() > 0.1]
    margin = 0.05 * (high - low)
    assert low - 1e-4 <= gate.min() < low + margin
    assert high - margin < gate.max() <= high + 1e-4


def test_upsampling_starts_bilinear_in_all_channels_or_as_published_into_the_first() -> None:
    features = torch.randn(1, 4, 6, 7)
    inside = (..., slice(1, -1), slice(1, -1))
    bilinear = F.interpolate(features, scale_factor=2, mode="bilinear", align_corners=False)
    mended, published = (DeformLayer(4, upsample_init=name).up_sample(features) for name in ("bilinear", "first_channel"))
    torch.testing.assert_close(mended[inside], bilinear[inside])
    torch.testing.assert_close(published[:, 0][inside], bilinear.sum(1)[inside])
    assert ((published[:, 1:] - bilinear[:, 1:])[inside].abs().amax((-2, -1)) > 0.1).all()


def test_an_unknown_start_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"upsample_init='bilinar' \(did you mean 'bilinear'\?\); expected one of bilinear, first_channel"):
        make(upsample_init="bilinar")


def test_one_image_is_enough_to_predict_and_too_few_to_train() -> None:
    decoder = make()
    assert decoder(make_maps(1))[0].isfinite().all()
    with pytest.raises(UsageError, match="'csm_fpn' trains its batch norms on global context: found 1 image a batch, expected 2 or more"):
        decoder.train()(make_maps(1))


def norm_names(name: str, width: int) -> dict[str, tuple[int, ...]]:
    parts = ("weight", "bias", "running_mean", "running_var")
    return {**{f"{name}.{part}": (width,) for part in parts}, f"{name}.num_batches_tracked": ()}


def test_the_pixel_decoder_has_the_names_of_pem_s_checkpoints(pem: Mask2Former) -> None:
    wanted: dict[str, tuple[int, ...]] = {}
    projections = [(f"in_projections.{index}", 256 * 2**index, 128) for index in range(4)]
    for name, source, target in [*projections, ("conv_avg", 2048, 128), ("out", 128, 256)]:
        wanted |= {f"{name}.conv.weight": (target, source, 1, 1), **norm_names(f"{name}.bn", target)}
    for index in range(4):
        name = f"csm.{index}.mlp.0.mlp"
        wanted |= {f"{name}.0.weight": (64, 128, 1, 1), f"{name}.3.weight": (128, 64, 1, 1), **norm_names(f"{name}.1", 64)}
    for index in range(3):
        name = f"dcn.{index}"
        wanted |= {f"{name}.dcn_offset.weight": (27, 128, 3, 3), f"{name}.dcn_offset.bias": (27,), f"{name}.dcn.weight": (128, 128, 3, 3)}
        wanted |= {f"{name}.up_sample.weight": (128, 128, 4, 4), **norm_names(f"{name}.dcn_bn", 128), **norm_names(f"{name}.up_bn", 128)}
    assert {name: tuple(tensor.shape) for name, tensor in pem.sem_seg_head.pixel_decoder.state_dict().items()} == wanted


def test_the_mask_decoder_has_pem_s_names_but_for_its_cross_attention(pem: Mask2Former) -> None:
    state = pem.sem_seg_head.predictor.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items() if name.startswith("input_proj.")} == {
        f"input_proj.{level}.{part}": shape for level in range(3) for part, shape in (("weight", (256, 128, 1, 1)), ("bias", (256,)))
    }
    cross = {name for name in state if name.startswith("transformer_cross_attention_layers.5.")}
    attention = {"alpha", *norm_names("local_conv.norm", 256), "local_conv.conv.weight", "local_conv.conv.bias"}
    layers = ("query_norm", "key_projection", "query_projection", "product_projection", "out_projection")
    attention |= {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    assert cross == {f"transformer_cross_attention_layers.5.multihead_attn.{name}" for name in attention}
    parts = ("weight", "bias")
    among = {
        "self_attn.in_proj_weight",
        "self_attn.in_proj_bias",
        *(f"{name}.{part}" for name in ("self_attn.out_proj", "norm") for part in parts),
    }
    ffn = {f"{name}.{part}" for name in ("linear1", "linear2", "norm") for part in parts}
    rest = {f"transformer_self_attention_layers.5.{name}" for name in among} | {f"transformer_ffn_layers.5.{name}" for name in ffn}
    assert {name for name in state if ".5." in name} - cross == rest


def test_parameters_are_the_published(pem: Mask2Former) -> None:
    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(pem.backbone) == 23_508_032
    assert count(pem.sem_seg_head.pixel_decoder) == 2_178_001
    assert count(pem.sem_seg_head.predictor) == 9_880_215
    assert count(pem) / 1e6 == pytest.approx(35.57, abs=0.005)


@pytest.mark.parametrize("attention", ["pem_ca", "pem_ca_published"])
@pytest.mark.parametrize(
    ("image_size", "total", "backbone", "pixel_decoder", "mask_decoder"),
    [("512x512", 30.5, 21.35, 3.91, 5.22), ("640x640", 47.0, 33.36, 6.11, 7.53), ("1024x2048", 236, 170.83, 31.30, 34.01)],
)
def test_multiply_adds_are_the_published(
    image_size: str, total: float, backbone: float, pixel_decoder: float, mask_decoder: float, attention: str
) -> None:
    params = {"scope": "model", "model": "pem_r50", "image_size": image_size, "classes": 150, "batch": 1}
    counted = count_macs(Arm(name=attention, attention=attention, switches={}), params)
    components = {name: macs / 1e9 for name, macs in counted["components"].items()}
    assert counted["macs"] / 1e9 == pytest.approx(total, rel=0.01)
    assert components.pop("backbone") == pytest.approx(backbone, rel=0.001)
    assert components.pop("pixel_decoder") == pytest.approx(pixel_decoder, rel=0.001)
    assert set(components) == {"input_projection", "cross_attention", "self_attention", "ffn", "mask_heads"}
    assert sum(components.values()) == pytest.approx(mask_decoder, rel=0.001)
    assert counted["closed_form_macs"] == pytest.approx(counted["components"]["cross_attention"], rel=0.005)


def test_the_model_is_pem_s_code_unless_told_otherwise(pem: Mask2Former) -> None:
    with torch.device("meta"):
        mended = build_model("pem_r50", num_classes=150, attention="pem_ca", double_sigmoid=False, upsample_init="bilinear")
    assert mended.state_dict().keys() == pem.state_dict().keys()
    for model, norm_axis, empty_mask, doubled in ((pem, "queries", "first_pixel", True), (mended, "row", "everywhere", False)):
        attentions = [module for module in model.modules() if isinstance(module, EMCA)]
        assert [(attention.norm_axis, attention.empty_mask) for attention in attentions] == [(norm_axis, empty_mask)] * 6
        assert {module.double_sigmoid for module in model.modules() if isinstance(module, CSM)} == {doubled}


def test_the_whole_model_learns() -> None:
    model = build_model("pem_r50", num_classes=3, layers=3)
    predictions = model(255 * torch.rand(2, 3, 40, 70))
    assert predictions.mask_logits.shape == (2, 100, 16, 24)
    scores = (*(part.class_logits for part in (predictions, *predictions.auxiliary)), predictions.mask_logits)
    sum((score * torch.randn_like(score)).sum() for score in scores).backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
