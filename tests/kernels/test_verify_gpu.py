"""The command that verifies everything on a GPU machine, as far as it can be tried without one."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def verify(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("verify_gpu", ROOT / "scripts" / "verify_gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "verify_gpu", module)
    spec.loader.exec_module(module)
    return module


def test_the_list_runs_nothing_and_names_what_is_missing(
    verify: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert verify.main(["--list", "--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].split(" ")[0] for line in lines] == [part.name for part in verify.parts(quick=True)]
    assert sum("(skipped: compute-sanitizer is not on PATH)" in line for line in lines) == 3
    assert any("(skipped: ncu is not on PATH)" in line for line in lines)
    assert any(line.endswith("run kernels_cuda --device cuda --quick") for line in lines)


def test_paths_that_the_parts_name_exist(verify: ModuleType) -> None:
    for part in verify.parts(quick=False):
        for word in part.command:
            if word.startswith("tests"):
                assert (ROOT / word).is_dir()
    assert (ROOT / "ablations" / "kernels_cuda.toml").is_file()


def test_without_a_device_nothing_runs(
    verify: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "has_device", lambda: False)
    monkeypatch.setattr(verify, "FOLDER", tmp_path / "verify")
    assert verify.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "verify").exists()


def test_a_failure_is_noted_and_the_rest_goes_on(verify: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good = verify.Part("good", [sys.executable, "-c", "import os; print(os.environ['ANSWER'])"], {"ANSWER": "42"})
    bad = verify.Part("bad", [sys.executable, "-c", "print('why'); raise SystemExit(3)"])
    absent = verify.Part("absent", ["no-such-program"], tool="no-such-program")
    monkeypatch.setattr(verify, "parts", lambda *, quick: [bad, absent, good])
    monkeypatch.setattr(verify, "has_device", lambda: True)
    monkeypatch.setattr(verify, "FOLDER", tmp_path / "verify")
    assert verify.main([]) == 1
    summary = json.loads((tmp_path / "verify" / "summary.json").read_text())
    assert [(entry["name"], entry["status"]) for entry in summary] == [("bad", "failed"), ("absent", "skipped"), ("good", "passed")]
    assert summary[0]["reason"] == "exit status 3, see verify/bad.log"
    assert (tmp_path / "verify" / "bad.log").read_text() == "why\n"
    assert (tmp_path / "verify" / "good.log").read_text() == "42\n"
