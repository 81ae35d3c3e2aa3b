"""The page on checkpoints: its blocks run as they stand, in order, in a folder with the files that they name."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from emca_bench.cli import main
from emca_bench.integrations.transformers import to_transformers
from emca_bench.models import build_model, load_checkpoint
from emca_bench.models.checkpoints import CheckpointError, write_tensors

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "checkpoints.md").read_text()
BLOCKS = re.findall(r"```(python|bash)\n(.*?)```", PAGE, re.DOTALL)
REPORTS = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
HUB_NAME = "facebook/mask2former-swin-tiny-ade-semantic"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the page's names: Mask2Former-R50 and PEM as published, Swin-T as Hugging Face saves it."""
    from transformers import Mask2FormerImageProcessorPil

    folder = tmp_path_factory.mktemp("checkpoints")
    r50 = build_model("mask2former_r50", num_classes=150, attention="masked")
    write_tensors({**r50.state_dict(), "criterion.empty_weight": torch.ones(151)}, folder / "model_final_500878.pkl")
    write_tensors(build_model("pem_r50", num_classes=19).state_dict(), folder / "pem_cityscapes.pth")
    hub = folder / HUB_NAME
    to_transformers(build_model("mask2former_swin_tiny", num_classes=150, attention="masked")).save_pretrained(hub)
    Mask2FormerImageProcessorPil().save_pretrained(hub)
    return folder


@pytest.fixture
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def test_the_page_has_blocks_of_both_kinds() -> None:
    assert [language for language, _ in BLOCKS].count("python") == 5
    assert [language for language, _ in BLOCKS].count("bash") == 1


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_block_runs(in_folder: Path, index: int, capsys: pytest.CaptureFixture[str]) -> None:
    language, code = BLOCKS[index]
    if language == "python":
        # random masks are nowhere sure of themselves: in float32 a bit may flip, and what follows with it
        exact = code.replace("512, 512)", "96, 96, dtype=torch.float64)").replace(
            "from_pretrained(name).eval()", "from_pretrained(name).eval().double()"
        )
        exec(compile(exact.replace("512", "96"), "docs/checkpoints.md", "exec"), {})
    else:
        for line in code.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "emca-bench"
            assert main(arguments) == 0, line
            assert (in_folder / arguments[2]).is_file()
    said = re.findall(r"# (cross-attention: .*)", code)
    printed = capsys.readouterr().out
    assert all(sentence in printed for sentence in said)


def test_error_of_the_page_is_what_is_said(in_folder: Path) -> None:
    with torch.device("meta"):
        model = build_model("mask2former_r50", num_classes=19, attention="masked")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, "model_final_500878.pkl")
    shown = [line for line in REPORTS[0].splitlines() if line != "  ..."]
    said = str(caught.value).splitlines()
    assert [line for line in said if line in shown] == shown
