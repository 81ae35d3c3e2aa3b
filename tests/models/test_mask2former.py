"""Complete models: checkpoints' names and shapes, counted work, odd sizes, and what a seed fixes."""

from __future__ import annotations

import ast
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from emca_bench.errors import UsageError
from emca_bench.inference import semantic, semantic_scores
from emca_bench.models import ATTENTIONS, MODELS, Predictions, build_model
from emca_bench.models.attention.emca import EMCA
from emca_bench.models.mask2former import Mask2Former
from emca_bench.models.pixel_decoders.msdeform import MSDeformAttn

FACTS = "mask2former_r50_state_dict.txt"


@pytest.fixture(scope="module")
def r50() -> Mask2Former:
    """The original model without memory or values."""
    with torch.device("meta"):
        return build_model("mask2former_r50", num_classes=150, attention="masked").eval().requires_grad_(False)


def test_r50_has_the_original_s_number_of_tensors_and_parameters(r50: Mask2Former) -> None:
    assert len(r50.state_dict()) == 557
    assert sum(parameter.numel() for parameter in r50.parameters()) / 1e6 == pytest.approx(44.0, abs=0.05)


@pytest.mark.skipif(not os.environ.get("EMCA_FACTS"), reason="EMCA_FACTS names no folder with the original's state dict")
def test_r50_has_the_original_s_names_and_shapes(r50: Mask2Former) -> None:
    lines = (Path(os.environ["EMCA_FACTS"]) / FACTS).read_text().splitlines()
    wanted = {name: ast.literal_eval(shape) for name, shape in (line.split(" ", 1) for line in lines)}
    assert wanted.pop("criterion.empty_weight") == (151,)
    assert {name: tuple(tensor.shape) for name, tensor in r50.state_dict().items()} == wanted


@pytest.mark.parametrize(
    "name",
    [
        "backbone.stem.conv1.norm.running_var",
        "backbone.res3.0.shortcut.weight",
        "sem_seg_head.pixel_decoder.input_proj.2.1.bias",
        "sem_seg_head.pixel_decoder.transformer.level_embed",
        "sem_seg_head.pixel_decoder.transformer.encoder.layers.5.self_attn.sampling_offsets.weight",
        "sem_seg_head.pixel_decoder.adapter_1.norm.weight",
        "sem_seg_head.predictor.transformer_cross_attention_layers.8.multihead_attn.in_proj_weight",
        "sem_seg_head.predictor.transformer_self_attention_layers.0.self_attn.out_proj.bias",
        "sem_seg_head.predictor.mask_embed.layers.2.weight",
        "sem_seg_head.predictor.query_feat.weight",
    ],
)
def test_r50_keeps_the_original_s_naming(r50: Mask2Former, name: str) -> None:
    assert name in r50.state_dict()


def test_r50_costs_what_is_published_at_512(r50: Mask2Former) -> None:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        predictions = r50(torch.empty(1, 3, 512, 512, device="meta"))
    assert predictions.class_logits.shape == (1, 100, 151)
    assert predictions.mask_logits.shape == (1, 100, 128, 128)
    assert 66e9 < counter.get_total_flops() / 2 < 71e9


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_r50_takes_every_attention_and_both_mask_sources(attention: str) -> None:
    for mask_source in ("logits", "features"):
        with torch.device("meta"):
            model = build_model("mask2former_r50", num_classes=19, attention=attention, mask_source=mask_source, layers=3, encoder_layers=1)
        assert model(torch.empty(2, 3, 96, 160, device="meta")).mask_logits.shape == (2, 100, 24, 40)


@pytest.mark.parametrize("size", [(65, 97), (33, 64), (32, 32), (7, 130)])
@pytest.mark.parametrize("mask_source", ["logits", "features"])
def test_any_size_is_padded_and_given_back(size: tuple[int, int], mask_source: str) -> None:
    model = build_model("mask2former_tiny", num_classes=4, mask_source=mask_source).eval()
    with torch.no_grad():
        predictions = model(255 * torch.rand(2, 3, *size))
    assert predictions.mask_logits.shape == (2, 20, *(math.ceil(side / 32) * 8 for side in size))
    assert predictions.image_size == size
    labels = semantic(predictions, size)
    assert labels.shape == (2, *size)
    assert labels.dtype == torch.int64
    assert labels.max() < 4


def test_padding_is_zero_after_normalisation() -> None:
    """An image of the mean colour and its padded form are one."""
    model = build_model("mask2former_tiny", num_classes=4).eval()
    grey = model.pixel_mean.expand(1, 3, 64, 96)
    with torch.no_grad():
        whole, part = model(grey), model(grey[..., :50, :70])
    torch.testing.assert_close(whole.mask_logits, part.mask_logits)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 4, 64, 64)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    model = build_model("mask2former_tiny", num_classes=4)
    with pytest.raises(ValueError, match=r"images has shape .* expected floating point \[B, 3, H, W\]"):
        model(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"images has shape .* and torch.uint8"):
        model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_seed_starts_all_but_the_attention_alike(attention: str, seed: int) -> None:
    def start(name: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        state = build_model("mask2former_tiny", num_classes=4, attention=name).state_dict()
        return {key: tensor for key, tensor in state.items() if ".multihead_attn." not in key}

    baseline, other = start("masked"), start(attention)
    assert baseline.keys() == other.keys()
    for key, tensor in baseline.items():
        assert torch.equal(tensor, other[key]), key


@pytest.mark.parametrize("name", MODELS)
def test_switches_reach_every_cross_attention(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name, num_classes=4, attention="emca", attention_switches={"residual": "raw"}, layers=4)
    attentions = {module for module in model.modules() if isinstance(module, EMCA)}
    assert [attention.residual for attention in attentions] == ["raw"] * 4


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("mask2former_r5", {}, "unknown model 'mask2former_r5' (did you mean 'mask2former_r50'?); known: "),
        ("mask2former_tiny", {"query": 3}, "model 'mask2former_tiny' has no override 'query' (did you mean 'queries'?); known: "),
        ("mask2former_tiny", {"attention": "maskd"}, "unknown attention 'maskd' (did you mean 'masked'?)"),
        (
            "mask2former_tiny",
            {"attention_switches": {"residul": "raw"}},
            "attention 'emca' has no switch 'residul' (did you mean 'residual'?)",
        ),
        ("mask2former_tiny", {"width": 60}, "width=60 must be a multiple of the 8 heads"),
        ("mask2former_tiny", {"mask_source": "logit"}, "mask_source='logit' (did you mean 'logits'?)"),
        ("mask2former_r50", {"norm": "frozn"}, "norm='frozn' (did you mean 'frozen'?)"),
    ],
)
def test_what_a_study_may_get_wrong_is_named(name: str, overrides: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(UsageError) as caught:
        build_model(name, num_classes=4, **overrides)
    assert str(caught.value).startswith(message)


def test_deformable_attention_looks_around_every_pixel_in_eight_directions() -> None:
    """At the start every head looks along its own direction, one pixel further with each point, at all levels alike."""
    attention = MSDeformAttn(width=32, levels=3, heads=8, points=4)
    assert not attention.sampling_offsets.weight.any()
    offsets = attention.sampling_offsets.bias.detach().view(8, 3, 4, 2)
    assert torch.equal(offsets[:, 0], offsets[:, 1])
    torch.testing.assert_close(offsets.abs().amax(-1), torch.arange(1.0, 5.0).expand(8, 3, 4))
    angles = torch.atan2(offsets[:, 0, 0, 1], offsets[:, 0, 0, 0]) % (2 * math.pi)
    torch.testing.assert_close(angles, torch.arange(8) * math.pi / 4, rtol=0, atol=1e-5)


def test_deformable_attention_reads_around_its_reference_points() -> None:
    """One level, one point, offsets of whole pixels: each pixel reads its right neighbour, and zero beyond the border."""
    attention = MSDeformAttn(width=4, levels=1, heads=1, points=1).double()
    for projection in (attention.value_proj, attention.output_proj):
        torch.nn.init.eye_(projection.weight)
    with torch.no_grad():
        attention.sampling_offsets.bias.copy_(torch.tensor([1.0, 0.0]))
    shape = (3, 5)
    values = torch.randn(2, 15, 4, dtype=torch.float64)
    y, x = torch.meshgrid((torch.arange(3) + 0.5) / 3, (torch.arange(5) + 0.5) / 5, indexing="ij")
    reference = torch.stack([x, y], -1).flatten(0, 1).double()
    moved = attention(torch.randn(2, 15, 4, dtype=torch.float64), reference, values, [shape])
    wanted = F.pad(values.unflatten(1, shape)[:, :, 1:], (0, 0, 0, 1)).flatten(1, 2)
    torch.testing.assert_close(moved, wanted, atol=1e-5, rtol=0)


def test_semantic_scores_follow_their_formula() -> None:
    class_logits, mask_logits = torch.randn(1, 3, 5, dtype=torch.float64), torch.randn(1, 3, 8, 16, dtype=torch.float64)
    predictions = Predictions(class_logits, mask_logits, (30, 61))
    masks = F.interpolate(mask_logits, size=(32, 64), mode="bilinear", align_corners=False)[..., :30, :61].sigmoid()
    wanted = torch.zeros(1, 4, 30, 61, dtype=torch.float64)
    for query in range(3):
        for label in range(4):
            share = class_logits[0, query, label].exp() / class_logits[0, query].exp().sum()
            wanted[0, label] += share * masks[0, query]
    torch.testing.assert_close(semantic_scores(predictions, (30, 61)), wanted)
    assert torch.equal(semantic(predictions, (30, 61)), wanted.argmax(1))
    resized = F.interpolate(wanted, size=(60, 122), mode="bilinear", align_corners=False)
    torch.testing.assert_close(semantic_scores(predictions, (60, 122)), resized)
