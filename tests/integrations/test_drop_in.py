"""Any attention inside Hugging Face's own model does exactly what it does in ours."""

from __future__ import annotations

import copy
import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from transformers import DetrConfig, Mask2FormerModel, SwinConfig

import emca_bench.integrations.transformers
from emca_bench.errors import UsageError
from emca_bench.integrations.transformers import from_transformers, replace_cross_attention, to_transformers
from emca_bench.models import ATTENTIONS, load_checkpoint

LEARNED = [name for name in ATTENTIONS if name not in ("masked", "masked_fused", "none")]
MakeHF = Callable[..., Any]


def pixels(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, dtype=dtype)


@torch.no_grad()
def outputs(hf: Any, pixel_values: Tensor) -> list[Tensor]:
    predicted = hf(pixel_values, output_auxiliary_logits=True)
    auxiliary = [tensor for each in predicted.auxiliary_logits for tensor in each.values()]
    return [predicted.class_queries_logits, predicted.masks_queries_logits, *auxiliary]


def cross_attentions(hf: Any) -> list[nn.Module]:
    return [layer.cross_attn for layer in hf.model.transformer_module.decoder.layers]


@pytest.mark.parametrize("attention", ["masked", "masked_fused"])
@pytest.mark.parametrize("backbone", ["resnet", "swin"])
def test_masked_attentions_change_nothing(make_hf: MakeHF, backbone: str, attention: str) -> None:
    hf, pixel_values = make_hf(backbone).double(), pixels(2, 3, 96, 160, dtype=torch.float64)
    before = outputs(hf, pixel_values)
    names = set(hf.state_dict())
    assert replace_cross_attention(hf, attention) is hf
    assert set(hf.state_dict()) == names
    for found, wanted in zip(outputs(hf, pixel_values), before, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_attention_does_what_it_does_in_our_model(make_hf: MakeHF, attention: str) -> None:
    """Residual, positions, masks, rule for empty masks and map size: all of it, or the outputs differ."""
    hf = replace_cross_attention(make_hf("resnet").double(), attention)
    ours = from_transformers(hf, attention=attention)
    images = 255 * torch.rand(2, 3, 64, 160, dtype=torch.float64)
    found = outputs(hf, (images - ours.pixel_mean) / ours.pixel_std)
    with torch.no_grad():
        wanted = ours(images)
    torch.testing.assert_close(found[0], wanted.class_logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1], wanted.mask_logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["emca", "pem_ca_published"])
def test_masks_come_as_predicted_empty_ones_too(make_hf: MakeHF, name: str) -> None:
    """Hugging Face's decoder opens empty masks before its layers see them; an attention has its own rule for them."""
    hf = replace_cross_attention(make_hf("resnet"), name)
    seen = []
    for attention in cross_attentions(hf):
        attention.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args[4], kwargs["shape"])), with_kwargs=True)
    head = hf.model.transformer_module.decoder.mask_predictor.mask_embedder
    with torch.no_grad():
        # the sign of the mask logits decides what is allowed: embeddings and features that never agree leave nothing
        getattr(head, "2")._modules["0"].weight.zero_()
        getattr(head, "2")._modules["0"].bias.fill_(-1)
        hf.model.pixel_level_module.decoder.mask_projection.weight.zero_()
        hf.model.pixel_level_module.decoder.mask_projection.bias.fill_(1)
    outputs(hf, pixels(2, 3, 64, 96))
    assert [shape for _, shape in seen] == [(2, 3), (4, 6), (8, 12), (2, 3)]
    assert [tuple(allowed.shape) for allowed, _ in seen] == [(2, 10, h * w) for _, (h, w) in seen]
    assert not any(allowed.any() for allowed, _ in seen)


@pytest.mark.parametrize("attention", LEARNED)
def test_gradients_reach_the_new_parameters(make_hf: MakeHF, attention: str) -> None:
    hf = replace_cross_attention(make_hf("resnet"), attention).train()
    hf.config.train_num_points = 50
    targets = {"mask_labels": [(torch.rand(2, 64, 96) < 0.5).float()] * 2, "class_labels": [torch.tensor([1, 3])] * 2}
    hf(pixels(2, 3, 64, 96), **targets).loss.backward()
    for module in cross_attentions(hf):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        assert any(parameter.grad.any() for parameter in module.parameters())


def test_layers_may_be_called_again(make_hf: MakeHF) -> None:
    """As gradient checkpointing does in the backward pass, when another image has gone through the model since."""
    plain = replace_cross_attention(make_hf("resnet").double(), "pem_ca_published")
    checked = copy.deepcopy(plain)
    for hf in (plain, checked):
        hf.model.transformer_module.train()
    for layer in checked.model.transformer_module.decoder.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    calls = []
    cross_attentions(checked)[1].register_forward_hook(lambda *_: calls.append(1))
    images = [pixels(1, 3, *size, dtype=torch.float64) for size in ((64, 96), (96, 64))]
    for hf in (plain, checked):
        torch.manual_seed(0)
        sum(hf(image).masks_queries_logits.square().mean() for image in images).backward()
    assert len(calls) == 4
    for (name, wanted), (_, found) in zip(plain.named_parameters(), checked.named_parameters(), strict=True):
        if wanted.grad is not None:
            torch.testing.assert_close(found.grad, wanted.grad, rtol=0, atol=1e-12, msg=name)


def test_state_dict_loads_into_a_model_with_the_same_replacement(make_hf: MakeHF, tmp_path: Path) -> None:
    source, target = (replace_cross_attention(make_hf("swin"), "emca") for _ in range(2))
    torch.save(source.state_dict(), tmp_path / "x.pth")
    target.load_state_dict(torch.load(tmp_path / "x.pth", weights_only=True))
    pixel_values = pixels(1, 3, 64, 96)
    for found, wanted in zip(outputs(target, pixel_values), outputs(source, pixel_values), strict=True):
        assert torch.equal(found, wanted)


def test_what_hugging_face_saves_loads_into_our_model(make_hf: MakeHF, tmp_path: Path) -> None:
    """It writes the names of transformers 4, with the new parameters among them."""
    hf = replace_cross_attention(make_hf("swin"), "emca")
    hf.save_pretrained(tmp_path)
    ours = from_transformers(make_hf("swin"), attention="emca")
    report = load_checkpoint(ours, tmp_path)
    assert report.complete
    assert report.naming == "Hugging Face transformers, Swin as in version 4"
    wanted = from_transformers(hf, attention="emca").state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def test_copies_are_independent(make_hf: MakeHF) -> None:
    source = replace_cross_attention(make_hf("resnet"), "emca")
    copied, pixel_values = copy.deepcopy(source), pixels(1, 3, 64, 96)
    before = outputs(source, pixel_values)
    with torch.no_grad():
        for attention in cross_attentions(copied):
            attention.alpha.zero_()
    assert not torch.equal(outputs(copied, pixel_values)[1], before[1])
    assert torch.equal(outputs(source, pixel_values)[1], before[1])


def test_replaced_again_and_back(make_hf: MakeHF) -> None:
    hf, pixel_values = make_hf("resnet").double(), pixels(1, 3, 64, 96, dtype=torch.float64)
    before, weights = outputs(hf, pixel_values), copy.deepcopy(hf.state_dict())
    replace_cross_attention(hf, "emca", residual="raw")
    projections = [attention.key_projection.weight.clone() for attention in cross_attentions(hf)]
    replace_cross_attention(hf, "emca", residual="projected", heads=2)
    assert all(torch.equal(new.key_projection.weight, old) for new, old in zip(cross_attentions(hf), projections, strict=True))
    assert {attention.residual for attention in cross_attentions(hf)} == {"projected"}
    replace_cross_attention(hf, "masked_fused").load_state_dict(weights)
    for found, wanted in zip(outputs(hf, pixel_values), before, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_nothing_of_an_image_is_kept(make_hf: MakeHF) -> None:
    hf = replace_cross_attention(make_hf("resnet"), "emca")
    outputs(hf, pixels(1, 3, 64, 96))
    assert not any(hasattr(attention, "inputs") for attention in cross_attentions(hf))


def test_half_precision_and_model_without_heads(make_hf: MakeHF) -> None:
    hf = make_hf("resnet").bfloat16()
    assert replace_cross_attention(hf.model, "emca") is hf.model
    assert isinstance(hf.model, Mask2FormerModel)
    assert {parameter.dtype for attention in cross_attentions(hf) for parameter in attention.parameters()} == {torch.bfloat16}
    assert outputs(hf, pixels(1, 3, 64, 96).bfloat16())[1].isfinite().all()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_our_model_as_hugging_face_s_and_back(make_hf: MakeHF, attention: str) -> None:
    ours = from_transformers(make_hf("swin").double(), attention=attention)
    hf = to_transformers(ours)
    images = 255 * torch.rand(1, 3, 64, 96, dtype=torch.float64)
    found = outputs(hf, (images - ours.pixel_mean) / ours.pixel_std)
    with torch.no_grad():
        torch.testing.assert_close(found[1], ours(images).mask_logits, rtol=0, atol=1e-12)
    back = from_transformers(hf, attention=attention)
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name


def test_weights_are_copies(make_hf: MakeHF) -> None:
    hf = make_hf("resnet")
    ours = from_transformers(hf)
    wanted = hf.class_predictor.weight.clone()
    with torch.no_grad():
        for tensor in ours.state_dict().values():
            tensor.zero_()
    assert torch.equal(hf.class_predictor.weight, wanted)


def test_statistics_of_the_image_processor_are_taken(make_hf: MakeHF) -> None:
    from transformers import Mask2FormerImageProcessorPil

    hf = make_hf("resnet")
    processor = Mask2FormerImageProcessorPil(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4], do_resize=False)
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    wanted = processor(images=image.permute(1, 2, 0).numpy(), return_tensors="pt")["pixel_values"]
    ours = from_transformers(hf, image_processor=processor)
    torch.testing.assert_close((image[None] - ours.pixel_mean) / ours.pixel_std, wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(ours.pixel_mean, from_transformers(hf).pixel_mean)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pre_norm": True}, "Mask2FormerConfig has pre_norm=True; expected False"),
        ({"dropout": 0.1}, "Mask2FormerConfig has dropout=0.1; expected 0"),
        ({"feature_size": 32}, "Mask2FormerConfig has feature_size=32; expected 64"),
        ({"enforce_input_projection": True}, "enforce_input_projection=True; expected False"),
        ({"activation_function": "gelu"}, "activation_function='gelu'; expected 'relu'"),
    ],
)
def test_settings_of_another_function_are_refused(make_hf: MakeHF, settings: dict[str, Any], words: str) -> None:
    for use in (from_transformers, replace_cross_attention):
        with pytest.raises(UsageError) as caught:
            use(make_hf("resnet", **settings))
        assert words in str(caught.value)


def test_backbones_of_another_kind_are_refused(make_hf: MakeHF) -> None:
    hf = make_hf("resnet")
    hf.config.backbone_config = DetrConfig()
    with pytest.raises(UsageError, match="backbone 'detr' of the Hugging Face model; expected resnet or swin"):
        from_transformers(hf)
    hf.config.backbone_config = SwinConfig(out_features=["stage4"])
    with pytest.raises(UsageError, match=r"SwinConfig has out_features=\['stage4'\]; expected \['stage1', "):
        from_transformers(hf)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "text"])
@pytest.mark.parametrize("use", [from_transformers, replace_cross_attention, to_transformers])
def test_other_models_are_refused(use: Callable[..., Any], model: Any) -> None:
    with pytest.raises(UsageError, match=f"a {type(model).__name__}; expected a Mask2Former"):
        use(model)


def test_a_wrong_name_or_switch_changes_nothing(make_hf: MakeHF) -> None:
    hf = make_hf("resnet")
    before = cross_attentions(hf)
    with pytest.raises(UsageError, match=r"unknown attention 'emac' \(did you mean 'emca'\?\)"):
        replace_cross_attention(hf, "emac")
    with pytest.raises(UsageError, match="attention 'emca' has no switch 'residul'"):
        replace_cross_attention(hf, "emca", residul="raw")
    assert cross_attentions(hf) == before


def test_an_attention_that_fits_in_part_is_an_error(make_hf: MakeHF) -> None:
    """Weights of a cross-attention are taken whole or, for another kind, not at all."""
    hf = replace_cross_attention(make_hf("resnet"), "emca")
    with pytest.raises(UsageError, match=r"(?s)the weights do not fit\n.*query_norm"):
        from_transformers(hf, attention="pem_ca")


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("mask2former_tiny", {}, "pixel decoder FPN; Hugging Face's Mask2Former has MSDeformAttnPixelDecoder"),
        ("pem_r50", {}, "pixel decoder CSMFPN"),
        ("mask2former_r50", {"mask_rule": "winner"}, "a mask decoder with mask_rule='winner'; Hugging Face's Mask2Former has threshold"),
    ],
)
def test_our_models_that_hugging_face_has_not(name: str, overrides: dict[str, Any], words: str) -> None:
    from emca_bench.models import build_model

    with torch.device("meta"):
        ours = build_model(name, num_classes=3, **overrides)
    with pytest.raises(UsageError) as caught:
        to_transformers(ours)
    assert words in str(caught.value)


def test_without_transformers_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"transformers 5.17 or newer is needed .*: python3 -m pip install 'emca-bench\[transformers\]'"):
        runpy.run_path(str(Path(emca_bench.integrations.transformers.__file__).with_name("available.py")))
