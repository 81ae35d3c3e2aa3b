"""Builds C++ and CUDA sources with ninja: once per source, compiler and torch, in a cache that processes share. Never at import.

The cache is `EMCA_CACHE`, else `$XDG_CACHE_HOME/emca-bench`, else `~/.cache/emca-bench`. A build that failed is not tried again until its
folder is deleted.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

LOG = "build.log"
SOURCE_SUFFIXES = (".cpp", ".h", ".cu", ".cuh")
STABLE_SINCE = (2, 10)
"""First torch whose stable interface has everything that the sources use."""


class BuildError(RuntimeError):
    """A library cannot be built here: says why, and where the compiler's words are."""


@dataclass(frozen=True)
class Tools:
    """What a build needs."""

    compiler: str
    ninja: str


class Recipe(ABC):
    """How one library is built."""

    name: ClassVar[str]
    """Its folder in the cache, and its file is emca_<name>.so."""
    sources: ClassVar[Path]
    seconds: ClassVar[int]
    """About how long a build takes."""

    @abstractmethod
    def find_compiler(self) -> str:
        """The compiler.

        Raises:
            BuildError: there is none.
        """

    @abstractmethod
    def rules(self, compiler: str) -> list[str]:
        """Lines of a ninja file that end with what builds `linked.so`."""

    @property
    def library(self) -> str:
        """The name of the library's file."""
        return f"emca_{self.name}.so"


def cache_folder() -> Path:
    """Where built libraries lie."""
    if os.environ.get("EMCA_CACHE"):
        return Path(os.environ["EMCA_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emca-bench"


def load_failure(recipe: Recipe) -> str | None:
    """Why a library cannot be had, or None once it is loaded; builds it if it is not there."""
    path = None
    try:
        path = built_library(recipe)
        torch.ops.load_library(str(path))
    except BuildError as error:
        return str(error)
    except OSError as error:
        return f"cannot load {path}: {error}"
    return None


def built_library(recipe: Recipe) -> Path:
    """The path of the built library, built now if it is not there; other processes that want it wait for the first.

    Raises:
        BuildError: no compiler, no ninja, an older torch, or a failed build.
    """
    tools = _find_tools(recipe)
    folder = cache_folder() / recipe.name / _fingerprint(recipe, tools)
    library = folder / recipe.library
    if library.is_file():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # filelock comes with torch
        from filelock import FileLock

        with FileLock(folder / "lock"):
            if not library.is_file():
                _build(recipe, folder, tools)
    except OSError as error:
        raise BuildError(f"cannot write the cache {folder}: {error.strerror or error}; EMCA_CACHE names another") from error
    return library


def find_host_compiler() -> str:
    """The C++ compiler.

    Raises:
        BuildError: there is none.
    """
    wanted = os.environ.get("CXX") or "g++"
    compiler = shutil.which(wanted)
    if compiler is None:
        raise BuildError(f"no C++ compiler: {wanted!r} is not on the path (CXX names another)")
    return compiler


def torch_flags() -> tuple[str, ...]:
    """Compiler flags for torch's stable interface."""
    include = Path(torch.__file__).parent / "include"
    major, minor = _torch_version()
    version = f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"
    return ("-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include"), version)


def torch_libraries(*names: str) -> tuple[str, ...]:
    """Linker flags for libraries of torch."""
    return (f"-L{Path(torch.__file__).parent / 'lib'}", *(f"-l{name}" for name in names))


def ninja_words(*words: str) -> str:
    """Words of a command as a ninja file holds them: quoted for the shell, dollars doubled for ninja."""
    return " ".join(shlex.quote(word) for word in words).replace("$", "$$")


def ninja_path(path: Path) -> str:
    """A path as ninja's build lines hold it."""
    return re.sub(r"([$: ])", r"$\1", str(path))


def _torch_version() -> tuple[int, int]:
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return major, minor


def _find_tools(recipe: Recipe) -> Tools:
    if sys.platform != "linux":
        raise BuildError(f"{recipe.name} kernels are built on Linux, this is {sys.platform}")
    if _torch_version() < STABLE_SINCE:
        raise BuildError(f"{recipe.name} kernels need torch {'.'.join(map(str, STABLE_SINCE))} or later, this is {torch.__version__}")
    compiler = recipe.find_compiler()
    # the `ninja` package puts its program beside python, which need not be on the path
    ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if ninja is None:
        raise BuildError("no ninja: pip install ninja")
    return Tools(compiler, ninja)


def _fingerprint(recipe: Recipe, tools: Tools) -> str:
    """Changes with everything that the library depends on."""
    version = subprocess.run([tools.compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = [version, torch.__version__, platform.machine(), *recipe.rules(tools.compiler)]
    parts += [path.read_text() for path in sorted(recipe.sources.iterdir()) if path.suffix in SOURCE_SUFFIXES]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _build(recipe: Recipe, folder: Path, tools: Tools) -> None:
    log = folder / LOG
    if log.is_file():
        raise BuildError(f"an earlier build failed: {_last_error(log.read_text())}; log: {log}; delete {folder} to try again")
    print(f"emca-bench: building the {recipe.name} kernels, once; about {recipe.seconds} s", file=sys.stderr)
    (folder / "build.ninja").write_text("\n".join([*recipe.rules(tools.compiler), "default linked.so", ""]))
    done = subprocess.run([tools.ninja, "-C", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        log.write_text(done.stdout + done.stderr)
        raise BuildError(f"the build failed: {_last_error(done.stdout + done.stderr)}; log: {log}")
    # appears whole or not at all
    os.replace(folder / "linked.so", folder / recipe.library)


def _last_error(text: str) -> str:
    """The first line that a compiler calls an error, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no output")
