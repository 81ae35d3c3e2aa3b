"""`emca-bench convert`: formats by suffix, names by choice, one sentence for what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from emca_bench.cli import main
from emca_bench.errors import UsageError
from emca_bench.models import build_model, load_checkpoint
from emca_bench.models.backbones.resnet import resnet10_quarter
from emca_bench.models.checkpoints import convert, read_tensors, write_tensors


def small(attention: str = "masked") -> torch.nn.Module:
    """With all that Hugging Face's model has, at the least size."""
    model = build_model("mask2former_r50", num_classes=3, attention=attention, layers=2, encoder_layers=1, width=32, queries=5)
    model.backbone = resnet10_quarter(norm="frozen")
    return model


@pytest.mark.parametrize("attention", ["masked", "emca"])
def test_chain_of_formats_and_names_keeps_every_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str], attention: str) -> None:
    source, target = small(attention), small(attention)
    first = tmp_path / "model_final.pkl"
    write_tensors({**source.state_dict(), "criterion.empty_weight": torch.ones(4)}, first)
    chain = [("a.safetensors", "transformers"), ("b.pth", "original"), ("c.bin", "transformers"), ("d.pkl", "original")]
    for name, names in chain:
        assert main(["convert", str(first), str(tmp_path / name), "--names", names]) == 0
        first = tmp_path / name
    printed = capsys.readouterr().out
    count = len(source.state_dict()) + 1
    assert f"model_final.pkl: {count} tensors, names of Mask2Former\n" in printed
    assert "a.safetensors: names of" not in printed
    assert f"b.pth: {count} tensors, names original\n" in printed
    assert "names of Hugging Face transformers\n" in printed
    assert load_checkpoint(target, first).complete
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor), name


def test_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layernorm = "model.pixel_level_module.encoder.swin.layernorm.weight"
    write_tensors({layernorm: torch.ones(1), "class_predictor.bias": torch.ones(2)}, tmp_path / "x.safetensors")
    assert main(["convert", str(tmp_path / "x.safetensors"), str(tmp_path / "y.pth")]) == 0
    assert f"left out, no model needs them: {layernorm}" in capsys.readouterr().out
    assert set(read_tensors(tmp_path / "y.pth")) == {"sem_seg_head.predictor.class_embed.bias"}


def test_a_tensor_without_a_name_is_an_error(tmp_path: Path) -> None:
    stray = "model.transformer_module.input_projections.0.weight"
    write_tensors({stray: torch.ones(1), "model.pixel_level_module.decoder.level_embed": torch.ones(1)}, tmp_path / "x.pth")
    with pytest.raises(UsageError, match=rf"x.pth: 1 tensors have no name in the original: {stray}"):
        convert(tmp_path / "x.pth", tmp_path / "y.pth")
    assert not (tmp_path / "y.pth").exists()


@pytest.mark.parametrize(
    ("source", "target", "names", "words"),
    [
        ("absent.pkl", "y.pth", "original", "no checkpoint absent.pkl"),
        ("x.pth", "y.npz", "original", "target y.npz has the suffix '.npz'"),
        ("x.pth", "absent/y.pth", "original", "cannot write absent/y.pth: No such file or directory"),
        ("pem.pth", "y.pth", "transformers", "have no name in Hugging Face's Mask2Former"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: str,
    target: str,
    names: str,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tensors({"sem_seg_head.predictor.decoder_norm.bias": torch.ones(1)}, "x.pth")
    write_tensors({"sem_seg_head.pixel_decoder.out.bn.bias": torch.ones(1)}, "pem.pth")
    assert main(["convert", source, target, "--names", names]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err
    assert printed.err.count("\n") == 1


def test_wrong_names(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"names='transformer' \(did you mean 'transformers'\?\)"):
        convert(tmp_path / "x.pth", tmp_path / "y.pth", names="transformer")
