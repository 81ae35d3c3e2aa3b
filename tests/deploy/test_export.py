"""An exported model is standard operators alone, and says what the eager one says."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

from emca_bench.cli import main
from emca_bench.deploy.export import export, export_program
from emca_bench.errors import UsageError
from emca_bench.models import build_model
from emca_bench.models.mask2former import Mask2Former

SIZE = (65, 97)


def make(attention: str, **switches: object) -> Mask2Former:
    model = build_model("mask2former_tiny", num_classes=5, attention=attention, attention_switches=switches, layers=2)
    return model.eval().requires_grad_(False)


def difference(found: tuple[np.ndarray, ...], model: Mask2Former, images: torch.Tensor) -> float:
    """The largest of a logit, in units of the largest logit."""
    wanted = model(images)
    pairs = list(zip(found, (wanted.class_logits.numpy(), wanted.mask_logits.numpy()), strict=True))
    assert all(one.shape == other.shape for one, other in pairs)
    return max(float(np.abs(one - other).max() / np.abs(other).max()) for one, other in pairs)


def assert_close(found: tuple[np.ndarray, ...], model: Mask2Former, images: torch.Tensor) -> None:
    assert difference(found, model, images) <= 1e-4


@pytest.mark.parametrize(
    ("attention", "switches"),
    [
        ("masked", {}),
        ("emca", {}),
        ("emca_soft", {}),
        ("emca_soft", {"heads": 4, "head_split": "features", "temperature": "per_head"}),
        ("emca", {"selection": "pool_and_prototype", "selection_gradient": "straight_through", "alpha": "one", "norm_axis": "none"}),
        ("emca", {"heads": 4, "head_split": "features", "alpha": "zero"}),
        ("emca", {"product": "plain"}),
    ],
)
def test_a_program_has_standard_operators_alone(attention: str, switches: dict[str, object]) -> None:
    # in double precision: no pixel or mask changes sides by rounding
    model = make(attention, **switches).double()
    program = export_program(model, size=SIZE, batch=2)
    named = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {name.split(".")[0] for name in named} <= {"aten", "<built-in function getitem>"}
    images = 255 * torch.rand(2, 3, *SIZE, dtype=torch.float64)
    assert_close(tuple(part.numpy() for part in program.module()(images)), model, images)


def test_onnxruntime_agrees(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime comes with the extra `export`")
    model = make("emca")
    path = tmp_path / "model.onnx"
    export(model, path, size=SIZE, batch=2)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    differences = []
    for _ in range(5):
        images = 255 * torch.rand(2, 3, *SIZE)
        differences.append(difference(tuple(session.run(None, {"images": images.numpy()})), model, images))
    # rounding may choose another pixel in one of them
    assert statistics.median(differences) <= 1e-4


def test_a_program_is_read_back(tmp_path: Path) -> None:
    model = make("masked")
    export(model, tmp_path / "model.pt2", size=SIZE)
    images = 255 * torch.rand(1, 3, *SIZE)
    assert_close(tuple(part.numpy() for part in torch.export.load(tmp_path / "model.pt2").module()(images)), model, images)


def test_what_cannot_be_exported_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="a Linear; expected a Mask2Former"):
        export_program(torch.nn.Linear(2, 2), size=SIZE)
    with pytest.raises(UsageError, match=r"suffix '.pb'; expected one of .onnx, .pt2"):
        export(make("masked"), tmp_path / "model.pb", size=SIZE)
    assert main(["export", "mask2former_tiny", "--out", str(tmp_path / "no" / "model.onnx")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert main(["export", "mask2former_tiny", "--size", "64", "--out", str(tmp_path / "model.onnx")]) == 2
    assert "--size '64' is not of the form HEIGHTxWIDTH" in capsys.readouterr().err
