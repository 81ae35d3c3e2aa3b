"""A checkpoint gets into a model whole, or the report and the error say what did not."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from emca_bench.errors import UsageError
from emca_bench.models import build_model, load_checkpoint
from emca_bench.models.checkpoints import CheckpointError, write_tensors
from emca_bench.models.mask2former import Mask2Former

CROSS = "sem_seg_head.predictor.transformer_cross_attention_layers."


def tiny(attention: str = "masked", num_classes: int = 4, **overrides: object) -> Mask2Former:
    return build_model("mask2former_tiny", num_classes=num_classes, attention=attention, **overrides)  # type: ignore[arg-type]


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        *(("mask2former_tiny", suffix) for suffix in (".pkl", ".pth", ".safetensors")),
        ("mask2former_r50", ".pkl"),
        ("mask2former_swin_tiny", ".pth"),
        ("pem_r50", ".safetensors"),
    ],
)
def test_model_to_file_to_model_is_bit_equal(tmp_path: Path, name: str, suffix: str) -> None:
    source, target = (build_model(name, num_classes=7, layers=1, attention="masked") for _ in range(2))
    for buffer in source.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2)
    write_tensors(source.state_dict(), tmp_path / f"x{suffix}")
    report = load_checkpoint(target, tmp_path / f"x{suffix}")
    assert report.complete
    assert report.naming == "Mask2Former"
    assert unchanged(target, values(source))


def test_a_file_as_published_loads(tmp_path: Path) -> None:
    """The layout and extra names of the model zoo's files; the loss's weights are no part of the model, and said to be ignored."""
    source, target = tiny(), tiny()
    arrays = {name: tensor.numpy() for name, tensor in source.state_dict().items()}
    arrays["criterion.empty_weight"] = torch.ones(5).numpy()
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "someone"}))
    report = load_checkpoint(target, tmp_path / "model_final.pkl")
    assert report.complete
    assert report.ignored == ("criterion.empty_weight",)
    assert "no weights, ignored (1): criterion.empty_weight" in str(report)
    assert unchanged(target, values(source))


def test_another_number_of_classes_names_tensors_and_shapes(tmp_path: Path) -> None:
    write_tensors(tiny(num_classes=9).state_dict(), tmp_path / "x.pth")
    model = tiny(num_classes=4)
    before = values(model)
    with pytest.raises(UsageError) as caught:
        load_checkpoint(model, tmp_path / "x.pth")
    message = str(caught.value)
    assert message.startswith("checkpoint does not fit the model, nothing was loaded; strict=False loads the part that fits")
    assert "of another shape: sem_seg_head.predictor.class_embed.bias [10], expected [5]" in message
    assert "of another shape: sem_seg_head.predictor.class_embed.weight [10, 64], expected [5, 64]" in message
    assert str(tmp_path / "x.pth") in message
    assert unchanged(model, before)

    report = load_checkpoint(model, tmp_path / "x.pth", strict=False)
    assert [name for name, _, _ in report.misshaped] == [f"sem_seg_head.predictor.class_embed.{end}" for end in ("bias", "weight")]
    assert "class head: nothing loaded: it stays as it was" in str(report)
    assert not report.complete
    assert torch.equal(model.sem_seg_head.predictor.class_embed.weight, before["sem_seg_head.predictor.class_embed.weight"])


@pytest.mark.parametrize("drop", ["backbone.stem.conv1.weight", f"{CROSS}0.norm.bias"])
def test_a_missing_or_unexpected_tensor_is_an_error_that_names_it(tmp_path: Path, drop: str) -> None:
    tensors = values(tiny())
    tensors["sem_seg_head.predictor.stray"] = tensors.pop(drop)
    write_tensors(tensors, tmp_path / "x.safetensors")
    model = tiny()
    before = values(model)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, tmp_path / "x.safetensors")
    assert f"missing in the checkpoint (1): {drop}" in str(caught.value)
    assert "not used by this model (1): sem_seg_head.predictor.stray" in str(caught.value)
    assert unchanged(model, before)


@pytest.mark.parametrize("attention", ["emca", "pem_ca", "none"])
def test_a_masked_checkpoint_starts_another_attention(tmp_path: Path, attention: str) -> None:
    source, target = tiny("masked"), tiny(attention)
    write_tensors(source.state_dict(), tmp_path / "x.pkl")
    before, wanted = values(target), values(source)
    report = load_checkpoint(target, tmp_path / "x.pkl", strict=False)
    for name, tensor in target.state_dict().items():
        fresh = ".multihead_attn." in name
        assert torch.equal(tensor, (before if fresh else wanted)[name]), name
        assert (name in report.loaded) != fresh
    assert len(report.unexpected) == 3 * 4
    text = str(report)
    for part in ("backbone", "pixel decoder", "self-attention", "feed-forward networks", "queries", "class head"):
        assert f"  {part}: loaded\n" in text
    if attention != "none":
        assert f"  cross-attention: 6 tensors loaded, {len(report.missing)} not in the checkpoint: they stay as they were" in text
    assert "not used by this model (12): " in text


def test_backbone_alone_starts_a_model(tmp_path: Path) -> None:
    source, target = tiny(), tiny()
    write_tensors(source.backbone.state_dict(), tmp_path / "R-10.pkl")
    with pytest.raises(CheckpointError, match="pixel decoder: nothing loaded"):
        load_checkpoint(target, tmp_path / "R-10.pkl")
    report = load_checkpoint(target, tmp_path / "R-10.pkl", strict=False)
    assert set(report.loaded) == {f"backbone.{name}" for name in source.backbone.state_dict()}
    assert unchanged(target.backbone, values(source.backbone))


def test_nothing_that_fits_is_an_error_even_if_a_part_is_asked_for(tmp_path: Path) -> None:
    write_tensors({"sem_seg_head.predictor.stray": torch.ones(1)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="nothing that fits"):
        load_checkpoint(tiny(), tmp_path / "x.pth", strict=False)


def test_unknown_names_name_the_file(tmp_path: Path) -> None:
    write_tensors({"encoder.weight": torch.ones(1)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=rf"checkpoint {tmp_path}/x.pth: names of no known kind: encoder.weight"):
        load_checkpoint(tiny(), tmp_path / "x.pth")


def test_values_take_the_model_s_dtype(tmp_path: Path) -> None:
    source, target = tiny(), tiny().double()
    write_tensors(source.state_dict(), tmp_path / "x.pth")
    load_checkpoint(target, tmp_path / "x.pth")
    assert unchanged(target, {name: tensor.double() for name, tensor in values(source).items()})


def test_tables_and_counters_need_not_be_in_the_file(tmp_path: Path) -> None:
    """Some libraries do not save them; a model has made them of its own sizes."""
    source, target = (build_model("mask2former_swin_tiny", num_classes=3, attention="masked", layers=1, encoder_layers=1) for _ in range(2))
    kept = {name: tensor for name, tensor in source.state_dict().items() if not name.endswith("relative_position_index")}
    assert len(kept) < len(source.state_dict())
    write_tensors(kept, tmp_path / "x.pth")
    assert load_checkpoint(target, tmp_path / "x.pth").complete
    assert unchanged(target, values(source))
