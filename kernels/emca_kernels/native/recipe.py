"""How the native library is built: one object of each file of kernels per instruction set."""

from __future__ import annotations

import platform
from itertools import product
from pathlib import Path

from emca_kernels.build import Recipe, find_host_compiler, ninja_path, ninja_words, torch_flags, torch_libraries

FLAGS = ("-O3", "-std=c++20", "-fPIC", "-Wall", "-Wextra", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
OPERATORS = ("host", "ops", "deformable_ops")
KERNELS = ("kernels", "deformable_kernels")
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {"base": ()}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ("-mavx2", "-mfma")
    INSTRUCTION_SETS["avx512"] = (*(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq")), "-mfma", "-mprefer-vector-width=512")
    INSTRUCTION_SETS["avx512bf16"] = (*INSTRUCTION_SETS["avx512"], "-mavx512bf16")


class NativeRecipe(Recipe):
    """C++ for CPUs."""

    name = "native"
    sources = Path(__file__).parent
    seconds = 20

    def find_compiler(self) -> str:
        """See `Recipe`."""
        return find_host_compiler()

    def rules(self, compiler: str) -> list[str]:
        """See `Recipe`."""
        lines = [
            "rule compile",
            f"  command = {ninja_words(compiler, *FLAGS)} $flags -c $in -o $out",
            "rule link",
            f"  command = {ninja_words(compiler, '-shared')} $in -o $out {ninja_words(*torch_libraries('torch_cpu', 'c10'))}",
        ]
        objects: list[str] = []
        for source in OPERATORS:
            objects.append(f"{source}.o")
            lines += [f"build {objects[-1]}: compile {ninja_path(self.sources / f'{source}.cpp')}"]
            lines += [f"  flags = {ninja_words(*torch_flags())}"]
        for source, (name, flags) in product(KERNELS, INSTRUCTION_SETS.items()):
            objects.append(f"{source}-{name}.o")
            lines += [f"build {objects[-1]}: compile {ninja_path(self.sources / f'{source}.cpp')}"]
            lines += [f"  flags = {ninja_words(f'-DISA={name}', *flags)}"]
        return [*lines, f"build linked.so: link {' '.join(objects)}"]


NATIVE = NativeRecipe()
