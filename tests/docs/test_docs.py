"""The README's commands and blocks, links, the citation file, and names that must not become importable."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from emca_bench.cli import main
from emca_bench.report.build import report_files
from emca_bench.report.readme import updated_readme

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
REFERENCE = ROOT / "reports" / "reference"
SPEED, ACCURACY = REFERENCE / "cpu-amd-epyc-2-cores-speed", REFERENCE / "cpu-amd-epyc-2-cores-facade"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    return [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]


def nox_sessions() -> set[str]:
    tree = ast.parse((ROOT / "noxfile.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {node.name for node in functions if any(ast.unparse(decorator) == "nox.session" for decorator in node.decorator_list)}


def test_first_screen_is_a_sentence_a_figure_a_table_and_two_commands():
    screen = README.split("## ")[0]
    assert len(screen.splitlines()) <= 45
    assert re.search(r"!\[.+\]\(reports/reference/.+\.svg\)", screen)
    assert screen.count("| ---") >= 1
    assert commands()[:2] == [
        "python3 -m pip install nox && python3 -m nox -s reproduce",
        "python3 -m pip install nox && python3 -m nox -s tests tests_triton tests_detectron2",
    ]


def test_every_nox_command_names_a_session():
    named = " ".join(re.findall(r"nox -s (\w+(?: \w+)*)", "\n".join(commands()))).split()
    assert "tests_detectron2" in named
    assert set(named) <= nox_sessions()


def test_continuous_integration_runs_the_test_command():
    assert commands()[1] in (ROOT / ".ci" / "run").read_text()


def test_studies_of_the_commands_are_valid(capsys: pytest.CaptureFixture[str]):
    for session in re.findall(r"nox -s (\w+)", "\n".join(commands())):
        if session != "tests":
            assert main(["validate", session]) == 0
    for study in ("camvid", "facade", "panoptic"):
        assert main(["validate", study]) == 0
    assert "cells" in capsys.readouterr().out


def test_what_the_reproduce_command_runs_ends_with_a_report(tmp_path: Path):
    """The session's own command on the smallest part of its study; the whole takes minutes."""
    call = [sys.executable, "-m", "emca_bench", "run", "reproduce", "--out", str(tmp_path / "run")]
    if "reproduce" not in {path.stem for path in (ROOT / "ablations").glob("*.toml")}:
        pytest.fail("the study of the README's first command is not there")
    small = tmp_path / "reproduce.toml"
    text = (ROOT / "ablations" / "attention.toml").read_text()
    small.write_text(text.replace('["16x16", "32x32", "64x64", "128x128"]', '["8x8"]').replace('pixels = "64x64"', 'pixels = "8x8"'))
    call[4] = str(small)
    ended = subprocess.run([*call, "--quick"], capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    assert Path(ended.stdout.splitlines()[-1].removeprefix("report: ")).is_file()


@pytest.mark.parametrize("code", blocks("python"))
def test_python_examples_run(code: str):
    small = code.replace("512", "64").replace("mask2former_r50", "mask2former_tiny")
    subprocess.run([sys.executable, "-c", small], check=True, timeout=300)


PAGES = [
    *sorted(str(path.relative_to(ROOT)) for folder in (ROOT, ROOT / "docs") for path in folder.glob("*.md")),
    "ablations/README.md",
    "kernels/README.md",
    "reports/README.md",
]


@pytest.mark.parametrize("page", PAGES)
def test_links_of_pages_lead_somewhere(page: str):
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
        if not target.startswith("http"):
            assert (ROOT / page).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("machine", sorted(path.name for path in REFERENCE.iterdir() if path.is_dir()))
def test_reference_report_is_what_its_records_say(machine: str):
    folder = REFERENCE / machine
    for name, content in report_files(folder).items():
        committed = folder / name
        if committed.suffix in {".html", ".png"} and not committed.exists():
            continue
        assert committed.read_bytes() == content, name


def test_readme_is_what_the_reference_records_say():
    assert updated_readme(ROOT / "README.md", SPEED, ACCURACY) == README


def test_citation_file_has_what_version_1_2_0_asks_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "version", "license"} <= set(citation)
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= set(reference)
    titles = " ".join(reference["title"] for reference in citation["references"])
    assert "Rethinking Mask2Former" in titles
    assert "PEM" in titles


@pytest.mark.parametrize("folder", ["kernels", "ablations", "benchmarks", "reports", "tests"])
def test_generic_folder_names_stay_out_of_the_way(folder: str, tmp_path: Path):
    assert not (ROOT / folder / "__init__.py").exists()
    found = subprocess.run(
        [sys.executable, "-c", f"import importlib.util; print(importlib.util.find_spec({folder!r}))"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "None"


def test_wheel_holds_the_two_packages_and_nothing_else():
    from setuptools import find_packages

    packages = {name for where in (ROOT, ROOT / "kernels") for name in find_packages(str(where), include=["emca_bench*", "emca_kernels*"])}
    assert {name.split(".")[0] for name in packages} == {"emca_bench", "emca_kernels"}
    for source in [*(ROOT / "emca_bench").rglob("*.py"), *(ROOT / "kernels" / "emca_kernels").rglob("*.py")]:
        root = ROOT / "kernels" if "emca_kernels" in source.parts else ROOT
        assert ".".join(source.parent.relative_to(root).parts) in packages, source
