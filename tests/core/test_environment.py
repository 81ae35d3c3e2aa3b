"""What makes two measurements ones of the same context."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

import pytest

import emca_bench.measure
from emca_bench import environment
from emca_bench.environment import MEASURED_SOURCES, PACKAGES, collect_environment, source_hash


def context() -> str:
    return str(collect_environment(threads=1, device="cpu")["context"])


@pytest.mark.parametrize("name", ["code.py", "code.cpp", "code.cu", "code.cuh", "code.h", "table.json"])
def test_every_kind_of_source_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    package = tmp_path / "measured_here"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(environment, "MEASURED_SOURCES", ("measured_here",))
    before = source_hash()
    (package / name).write_text("1")
    there = source_hash()
    (package / name).write_text("2")
    assert len({before, there, source_hash()}) == 3


def test_sources_are_all_that_measurements_run():
    """What the package `measure` imports is hashed, or is known to decide nothing that is measured."""
    # what a study says is in the keys of its cells
    decides_nothing = tuple(f"emca_bench.{name}" for name in ("environment", "errors", "progress", "records", "specs"))
    importlib.import_module("emca_bench.integrations.transformers.running")
    # whatever other tests have imported before
    for module in pkgutil.iter_modules(emca_bench.measure.__path__):
        importlib.import_module(f"emca_bench.measure.{module.name}")
    loaded = {name for name in sys.modules if name.startswith(("emca_bench.measure", "emca_kernels"))}
    assert loaded
    used = {
        value.__module__
        for name in loaded
        for value in vars(sys.modules[name]).values()
        if str(getattr(value, "__module__", "")).startswith(("emca_bench", "emca_kernels"))
    }
    known = (*MEASURED_SOURCES, *decides_nothing)
    assert not {name for name in used if not any(name == package or name.startswith(f"{package}.") for package in known)}
    for name in ("emca_bench.deploy", "emca_bench.onednn", "emca_bench.integrations.transformers"):
        assert name in MEASURED_SOURCES


@pytest.mark.parametrize("name", ["EMCA_BACKEND", "EMCA_ISA"])
def test_overrides_are_another_context(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.delenv(name, raising=False)
    before = context()
    monkeypatch.setenv(name, "reference")
    assert context() != before
    assert collect_environment(threads=1, device="cpu")["identity"][name] == "reference"


@pytest.mark.parametrize("name", ["transformers", "onnxruntime", "torch-ms-deform-attn"])
def test_versions_of_rivals_are_another_context(monkeypatch: pytest.MonkeyPatch, name: str):
    before = context()
    assert name in PACKAGES
    version = environment._version
    monkeypatch.setattr(environment, "_version", lambda package: "0.0.1" if package == name else version(package))
    assert context() != before
