"""How the CUDA library is built."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from emca_kernels.build import BuildError, Recipe, find_host_compiler, ninja_path, ninja_words, torch_flags, torch_libraries

# a: wgmma is in no other architecture
ARCHITECTURE = "-gencode=arch=compute_90a,code=sm_90a"
FLAGS = ("-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-Wall,-Wextra")


class CudaRecipe(Recipe):
    """CUDA C++ for Hopper."""

    name = "cuda"
    sources = Path(__file__).parent
    seconds = 30

    def find_compiler(self) -> str:
        """See `Recipe`."""
        if torch.version.cuda is None:
            raise BuildError(f"torch {torch.__version__} is built without CUDA")
        return find_nvcc()

    def rules(self, compiler: str) -> list[str]:
        """See `Recipe`."""
        return [
            "rule compile",
            f"  command = {ninja_words(*compile_command(compiler))} $flags -c $in -o $out",
            "rule link",
            f"  command = {ninja_words(compiler, '-shared')} $in -o $out {ninja_words(*torch_libraries('torch_cuda', 'torch_cpu', 'c10'))}",
            f"build launch.o: compile {ninja_path(self.sources / 'launch.cu')}",
            f"build ops.o: compile {ninja_path(self.sources / 'ops.cpp')}",
            f"  flags = {ninja_words('-DUSE_CUDA', *torch_flags())}",
            "build linked.so: link launch.o ops.o",
        ]


def find_nvcc() -> str:
    """The CUDA compiler.

    Raises:
        BuildError: there is none.
    """
    wanted = os.environ.get("CUDACXX") or "nvcc"
    compiler = shutil.which(wanted)
    if compiler is None:
        raise BuildError(f"no {wanted} on the path (CUDACXX names another)")
    return compiler


def compile_command(compiler: str) -> list[str]:
    """What every source is compiled with, but for inputs and outputs."""
    host = ["-ccbin", find_host_compiler()] if os.environ.get("CXX") else []
    return [compiler, ARCHITECTURE, *host, *FLAGS]


CUDA = CudaRecipe()
