"""How the native library is built: one object of the kernels per instruction set."""

from __future__ import annotations

import platform
from pathlib import Path

from emca_kernels.build import Recipe, find_host_compiler, torch_flags, torch_libraries

FLAGS = ("-O3", "-std=c++20", "-fPIC", "-Wall", "-Wextra", "-fno-math-errno", "-ffp-contract=fast")
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
            f"  command = {compiler} {' '.join(FLAGS)} $flags -c $in -o $out",
            "rule link",
            f"  command = {compiler} -shared $in -o $out {torch_libraries('torch_cpu', 'c10')}",
            f"build ops.o: compile {self.sources / 'ops.cpp'}",
            f"  flags = {torch_flags()}",
        ]
        for name, flags in INSTRUCTION_SETS.items():
            lines += [f"build {name}.o: compile {self.sources / 'kernels.cpp'}", f"  flags = -DISA={name} {' '.join(flags)}"]
        objects = " ".join(f"{name}.o" for name in INSTRUCTION_SETS)
        return [*lines, f"build linked.so: link ops.o {objects}"]


NATIVE = NativeRecipe()
