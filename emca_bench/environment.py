"""What a measurement was taken on: processor, devices, versions, source. No host, user or path names."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from emca_bench.errors import UsageError
from emca_bench.specs import canonical_json

PACKAGES = ("torch", "numpy", "scipy", "timm", "triton", "transformers", "onnxruntime", "torch-ms-deform-attn")
"""What measurements run on, and the rivals that they run."""

OVERRIDES = ("EMCA_BACKEND", "EMCA_ISA")
"""Variables that choose what serves a kernel operator."""

MEASURED_SOURCES = (
    "emca_kernels",
    "emca_bench.models",
    "emca_bench.deploy",
    "emca_bench.onednn",
    "emca_bench.integrations.transformers",
    "emca_bench.inference",
    "emca_bench.data",
    "emca_bench.train",
    "emca_bench.evaluate",
    "emca_bench.measure",
)
"""Packages and modules that decide what is measured; reports, progress and the command line do not."""

SOURCE_SUFFIXES = frozenset({".py", ".cpp", ".cu", ".cuh", ".h", ".json"})
"""Of their files: code, and tables that code reads."""


def default_threads() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def collect_environment(*, threads: int, device: str) -> dict[str, Any]:
    """The identity of machine, versions and source, and the state of this moment.

    Imports torch. Call it in the process that measures.

    Raises:
        UsageError: no such device.

    Returns:
        {"context": 12 hex digits of the identity, "identity": {...}, "state": {...}}
    """
    import torch

    check_device(device)
    identity = {
        "cpu": _cpu_model(),
        "cores": default_threads(),
        "threads": threads,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "device": device,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        **{name: os.environ.get(name) for name in OVERRIDES},
        "source": source_hash(),
    }
    context = hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:12]
    return {"context": context, "identity": identity, "state": _state()}


def check_device(device: str) -> None:
    """Imports torch.

    Raises:
        UsageError: device "cuda" where torch finds none.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("the study or --device names cuda, but torch finds no CUDA device; expected --device cpu here")


def source_hash() -> str:
    """12 hex digits of the source that measurements depend on."""
    digest = hashlib.sha256()
    for name in MEASURED_SOURCES:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        file = Path(spec.origin)
        inside = file.parent.rglob("*") if spec.submodule_search_locations else [file]
        for path in sorted(path for path in inside if path.suffix in SOURCE_SUFFIXES):
            digest.update(path.relative_to(file.parent).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _state() -> dict[str, Any]:
    commit, dirty = _git()
    return {
        "git_commit": commit,
        "git_dirty": dirty,
        "load_average": round(os.getloadavg()[0], 2),
        "started": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _git() -> tuple[str | None, bool | None]:
    root = Path(__file__).resolve().parents[1]

    def ask(*words: str) -> str | None:
        try:
            answer = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    if ask("ls-files", "--error-unmatch", "emca_bench/environment.py") is None:
        return None, None
    commit = ask("rev-parse", "--short=12", "HEAD")
    return commit, bool(ask("status", "--porcelain", "--untracked-files=no"))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or "unknown"
