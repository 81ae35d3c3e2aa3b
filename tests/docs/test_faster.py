"""The page on speed: its blocks run as they stand, in order, on a small model where the page names R50."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from emca_bench.cli import build_parser, main
from emca_bench.models import build_model
from emca_bench.models.checkpoints import write_tensors
from emca_bench.specs import find_study, load_studies

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "faster.md").read_text()
BLOCKS = re.findall(r"```(python|bash)\n(.*?)```", PAGE, re.DOTALL)


def smaller(code: str) -> str:
    return code.replace("mask2former_r50", "mask2former_tiny").replace("512", "64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faster")
    model = build_model("mask2former_tiny", num_classes=150, attention="masked_fused")
    write_tensors({**model.state_dict(), "criterion.empty_weight": torch.ones(151)}, folder / "model_final_500878.pkl")
    return folder


def commands() -> list[list[str]]:
    (block,) = (code for language, code in BLOCKS if language == "bash")
    return [shlex.split(line) for line in block.splitlines()]


def test_the_page_is_five_commands() -> None:
    assert len(commands()) == 5
    assert [language for language, _ in BLOCKS].count("python") == 3


@pytest.mark.slow
def test_commands_and_blocks_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    install, *rest = commands()
    assert install[:4] == ["python3", "-m", "pip", "install"]
    for program, *arguments in rest:
        assert program == "emca-bench"
        if arguments[0] in ("convert", "export"):
            assert main([smaller(word) for word in arguments]) == 0, arguments
    assert (folder / "model.onnx").is_file()
    for language, code in BLOCKS:
        if language == "python":
            exec(compile(smaller(code), "docs/faster.md", "exec"), {})


def test_commands_that_measure_name_what_there_is() -> None:
    _, _, _, run, report = commands()
    arguments = build_parser().parse_args(run[1:])
    (study,) = load_studies(find_study(arguments.study), quick=arguments.quick)
    assert {"hugging_face", "masked_exact_rewrites"} <= {arm.name for arm in study.arms}
    assert report[-1] == f"reports/local/{arguments.study}-quick"
