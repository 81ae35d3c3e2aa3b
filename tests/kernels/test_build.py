"""Building the native library: once, for all who want it, and a clear word where it cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emca_kernels.build import BuildError, built_library
from emca_kernels.native import library
from emca_kernels.native.recipe import NATIVE

needs_tools = pytest.mark.skipif(library.unavailable() is not None, reason=f"cannot build here: {library.unavailable()}")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EMCA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def compiler(tmp_path: Path, body: str) -> str:
    """A program that stands for a C++ compiler."""
    path = tmp_path / "c++"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


@needs_tools
@pytest.mark.slow
def test_processes_that_want_it_at_once_build_it_once(cache: Path) -> None:
    command = [sys.executable, "-c", "from emca_kernels.native import library; print(library.unavailable(), library.instruction_set())"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert all(out.startswith("None ") for out, _ in outputs)
    assert "".join(err for _, err in outputs).count("building the native kernels") == 1
    assert len(list(cache.rglob(NATIVE.library))) == 1


def test_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler: 'no-such-compiler' is not on the path"):
        built_library(NATIVE)


@needs_tools
def test_folders_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler is handed files that exist, and a definition as one word."""
    odd = tmp_path / "it's a $HOME: of kernels"
    shutil.copytree(NATIVE.sources, odd / "native")
    monkeypatch.setenv("EMCA_CACHE", str(odd / "cache"))
    check = """
case "$1" in --version) exit 0;; esac
expected=file
for word; do
  case "$expected" in input) [ -f "$word" ] || { echo "error: no $word" >&2; exit 1; };; output) : > "$word";; esac
  expected=other
  case "$word" in -c) expected=input;; -o) expected=output;; esac
done"""
    monkeypatch.setenv("CXX", compiler(odd, check))

    class Elsewhere(type(NATIVE)):  # type: ignore[misc]
        sources = odd / "native"

    assert built_library(Elsewhere()).is_file()


@needs_tools
def test_a_failed_build_names_command_and_log_and_is_not_tried_again(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tmp_path / "calls"
    monkeypatch.setenv("CXX", compiler(tmp_path, f'[ "$1" = --version ] || echo x >> {calls}; echo "x.cpp:1: error: no luck" >&2; exit 1'))
    with pytest.raises(BuildError, match=r"the build failed: .*error: no luck; log: ") as caught:
        built_library(NATIVE)
    log = Path(str(caught.value).rsplit("log: ", 1)[1])
    assert str(tmp_path / "c++") in log.read_text()
    before = calls.read_text()
    with pytest.raises(BuildError, match=r"an earlier build failed: .*error: no luck.*delete .* to try again"):
        built_library(NATIVE)
    assert calls.read_text() == before


@needs_tools
def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EMCA_CACHE", str(tmp_path / "file"))
    with pytest.raises(BuildError, match=r"cannot write the cache .*file.*EMCA_CACHE names another"):
        built_library(NATIVE)


def test_an_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.__version__", "2.9.1")
    with pytest.raises(BuildError, match=r"need torch 2.10 or later, this is 2.9.1"):
        built_library(NATIVE)


def test_without_the_library_the_reference_serves(cache: Path) -> None:
    """In a process of its own: what cannot be built is found out once."""
    code = (
        "import torch; from emca_kernels import explain_backend, select_prototypes\n"
        "t = torch.randn(1, 4, 4); print(explain_backend('select_prototypes', t, t)); select_prototypes(t, t)"
    )
    environment = {**os.environ, "CXX": "no-such-compiler"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith("('reference', ")
    assert "native: no C++ compiler: 'no-such-compiler'" in done.stdout
