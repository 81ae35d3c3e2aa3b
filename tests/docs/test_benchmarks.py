"""The profile with pytest-benchmark: a command of its own, right before it is timed, without the name of the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark comes with the extra `test`")


def run_pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "EMCA_BACKEND": ""})


def test_results_are_a_table_and_a_file(tmp_path: Path):
    target = tmp_path / "benchmark.json"
    case = "P256 and reference and forward and float32"
    done = run_pytest("benchmarks", "--quick", "--threads", "1", "-k", case, f"--benchmark-json={target}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("- benchmark ") == 1
    written = json.loads(target.read_text())
    assert "node" not in written["machine_info"]
    work = {entry["params"]["pass_"]: entry["extra_info"] for entry in written["benchmarks"] if "select" in entry["name"]}
    assert work["forward"]["flops"] == 2 * 256 * 100 * 256
    assert len(written["benchmarks"]) == 5


def test_a_wrong_operator_is_not_timed(tmp_path: Path):
    """A selection that always takes pixel 0 fails its check, and leaves no number."""
    plugin = tmp_path / "broken.py"
    plugin.write_text(
        "import torch\n"
        "from emca_kernels.backends import Backend, register_backend, serves_all\n"
        "from emca_kernels.select_prototypes import reference\n"
        "def wrong(features, queries, *rest, **options):\n"
        "    indices, scores = reference.select_prototypes(features, queries, *rest, **options)\n"
        "    return torch.zeros_like(indices), scores\n"
        "register_backend('select_prototypes', Backend('broken', wrong, serves_all))\n"
    )
    call = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "broken", "benchmarks", "--quick", "-k", "broken and P256"]
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 1
    assert "2 failed" in done.stdout
    assert "- benchmark " not in done.stdout


def test_the_tests_do_not_collect_it():
    done = run_pytest("--collect-only", "-q", "tests/docs", "--ignore=tests/docs/test_docs.py")
    assert "benchmarks/" not in done.stdout
    assert "benchmarks" not in (ROOT / "pyproject.toml").read_text().split("testpaths = ")[1].splitlines()[0]
