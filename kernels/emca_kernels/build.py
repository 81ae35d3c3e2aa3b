"""Builds the native sources with ninja: once per source, compiler and torch, in a cache that processes share. Never at import.

The cache is `EMCA_CACHE`, else `$XDG_CACHE_HOME/emca-bench`, else `~/.cache/emca-bench`. A build that failed is not tried again until its
folder is deleted.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "native"
LOG, LIBRARY = "build.log", "emca_native.so"
BASE_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-Wall", "-Wextra", "-fno-math-errno", "-ffp-contract=fast")
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {"base": ()}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ("-mavx2", "-mfma")
    INSTRUCTION_SETS["avx512"] = (*(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq")), "-mfma", "-mprefer-vector-width=512")
STABLE_SINCE = (2, 10)
"""First torch whose stable interface has everything that the sources use."""


class BuildError(RuntimeError):
    """The native library cannot be built here: says why, and where the compiler's words are."""


@dataclass(frozen=True)
class Tools:
    """What a build needs."""

    compiler: str
    ninja: str


def cache_folder() -> Path:
    """Where built libraries lie."""
    if os.environ.get("EMCA_CACHE"):
        return Path(os.environ["EMCA_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emca-bench"


def native_library() -> Path:
    """The path of the built library, built now if it is not there; other processes that want it wait for the first.

    Raises:
        BuildError: no compiler, no ninja, an older torch, or a failed build.
    """
    tools = find_tools()
    folder = cache_folder() / "native" / _fingerprint(tools)
    if (folder / LIBRARY).is_file():
        return folder / LIBRARY
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # filelock comes with torch
        from filelock import FileLock

        with FileLock(folder / "lock"):
            if not (folder / LIBRARY).is_file():
                _build(folder, tools)
    except OSError as error:
        raise BuildError(f"cannot write the cache {folder}: {error.strerror or error}; EMCA_CACHE names another") from error
    return folder / LIBRARY


def find_tools() -> Tools:
    """Compiler and ninja.

    Raises:
        BuildError: naming what is missing.
    """
    if sys.platform != "linux":
        raise BuildError(f"native kernels are built on Linux, this is {sys.platform}")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < STABLE_SINCE:
        raise BuildError(f"native kernels need torch {'.'.join(map(str, STABLE_SINCE))} or later, this is {torch.__version__}")
    wanted = os.environ.get("CXX") or "g++"
    compiler = shutil.which(wanted)
    if compiler is None:
        raise BuildError(f"no C++ compiler: {wanted!r} is not on the path (CXX names another)")
    # the `ninja` package puts its program beside python, which need not be on the path
    ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if ninja is None:
        raise BuildError("no ninja: pip install ninja")
    return Tools(compiler, ninja)


def _fingerprint(tools: Tools) -> str:
    """Changes with everything that the library depends on."""
    version = subprocess.run([tools.compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = [version, torch.__version__, platform.machine(), _build_file(tools.compiler)]
    parts += [path.read_text() for path in sorted(SOURCES.iterdir()) if path.suffix in (".cpp", ".h")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _build_file(compiler: str) -> str:
    root = Path(torch.__file__).parent
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    target = f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"
    include = f"-isystem {root / 'include'} -isystem {root / 'include/torch/csrc/api/include'}"
    lines = [
        "rule compile",
        f"  command = {compiler} {' '.join(BASE_FLAGS)} $flags -c $in -o $out",
        "rule link",
        f"  command = {compiler} -shared $in -o $out -L{root / 'lib'} -ltorch_cpu -lc10",
        f"build ops.o: compile {SOURCES / 'ops.cpp'}",
        f"  flags = {include} {target}",
    ]
    for name, flags in INSTRUCTION_SETS.items():
        lines += [f"build {name}.o: compile {SOURCES / 'kernels.cpp'}", f"  flags = -DISA={name} {' '.join(flags)}"]
    objects = " ".join(f"{name}.o" for name in INSTRUCTION_SETS)
    return "\n".join([*lines, f"build linked.so: link ops.o {objects}", "default linked.so", ""])


def _build(folder: Path, tools: Tools) -> None:
    log = folder / LOG
    if log.is_file():
        raise BuildError(f"an earlier build failed: {_last_error(log.read_text())}; log: {log}; delete {folder} to try again")
    print("emca-bench: building the native kernels, once; about 15 s", file=sys.stderr)
    (folder / "build.ninja").write_text(_build_file(tools.compiler))
    done = subprocess.run([tools.ninja, "-C", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        log.write_text(done.stdout + done.stderr)
        raise BuildError(f"the build failed: {_last_error(done.stdout + done.stderr)}; log: {log}")
    # appears whole or not at all
    os.replace(folder / "linked.so", folder / LIBRARY)


def _last_error(text: str) -> str:
    """The first line that a compiler calls an error, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no output")
