"""Compiles every kernel for GPUs that need not be there, and reads registers, spills, shared memory and instructions out of the result.

    python -m emca_kernels.triton.inspection            compares with compiled.json
    python -m emca_kernels.triton.inspection --write    writes it anew, for the installed version of Triton

Triton's compiler and the disassembler that comes with it need no GPU and no driver.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from emca_kernels.triton.configs import SHARED_MEMORY_BYTES
from emca_kernels.triton.runtime import Launch, interpreting

TABLE = Path(__file__).parent / "compiled.json"
OPERATORS = ("select_prototypes", "pool_prototypes", "emca_attention", "deformable_attention")
KERNELS = tuple(f"emca_kernels.{operator}.triton_kernels" for operator in OPERATORS)
"""Modules with a function `variants(architecture)`: name -> launches, one for each branch of their kernels."""
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8"}
WITHOUT_PRODUCTS = ("merge", "deformable_attention")
"""Begin the names of kernels that multiply no matrices, and so need no tensor cores."""
REGISTERS_MAY_GROW = 1.1


def variants(architecture: int) -> Iterator[tuple[str, Launch]]:
    """Name and launch of every kernel that is checked, on tensors without values; of equal kernels the first."""
    seen: set[str] = set()
    for module in KERNELS:
        for name, launches in importlib.import_module(module).variants(architecture):
            for launch in launches:
                kernel = launch.kernel.fn.__name__.removesuffix("_kernel")
                source = source_of(launch)
                same = repr((kernel, source.signature, source.constants, source.attrs))
                if same not in seen:
                    seen.add(same)
                    yield f"sm_{architecture} {kernel} {name}", launch


def source_of(launch: Launch) -> Any:
    """What Triton would compile for this launch: a number that is 1 is a constant, one that 16 divides is known to be.

    Tuples keep their form; their members have paths, such as (2, 0) for the first one of the third argument.
    """
    from triton.compiler import ASTSource

    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def describe(value: Any, path: tuple[int, ...], is_constant: bool) -> Any:
        if is_constant or (type(value) is int and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, tuple):
            return type(value)(*(describe(member, (*path, place), False) for place, member in enumerate(value)))
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return f"*{TYPES[value.dtype]}"
        return "i32" if abs(value) < 1 << 31 else "i64"

    for place, parameter in enumerate(launch.kernel.params):
        signature[parameter.name] = describe(launch.arguments[parameter.name], (place,), parameter.is_constexpr)
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def inspect(architecture: int, launch: Launch) -> dict[str, int]:
    """Compile one launch and count registers and spilled bytes a thread, bytes of shared memory a block, and instructions."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source_of(launch), target=GPUTarget("cuda", architecture, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", binary.name)
        assembly = _output(tools / "nvdisasm", "-c", binary.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage says nothing of registers: {usage[-500:]}")
    return {
        "registers": int(found[1]),
        "spilled_bytes": max(int(found[2]), 4 * len(re.findall(r"\b(?:LDL|STL)\b", assembly))),
        "shared_memory_bytes": int(compiled.metadata.shared),
        "tensor_core_instructions": len(re.findall(r"\b(?:HGMMA|HMMA)\b", assembly)),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", assembly, re.MULTILINE)),
    }


def _output(*command: str | Path) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def _inspect_named(architecture: int, name: str) -> tuple[str, dict[str, int]]:
    return name, inspect(architecture, dict(variants(architecture))[name])


def inspect_all(processes: int, matching: str = "") -> dict[str, dict[str, int]]:
    """Every kernel that is checked, compiled in processes of their own.

    Raises:
        RuntimeError: kernels of this process are interpreted, so they cannot be compiled.
    """
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET=1 makes kernels interpreted ones: unset it to compile them")
    wanted = [(architecture, name) for architecture in SHARED_MEMORY_BYTES for name, _ in variants(architecture) if matching in name]
    with ProcessPoolExecutor(processes) as pool:
        return dict(sorted(pool.map(_inspect_named, *zip(*wanted, strict=True))))


def complaints(found: dict[str, dict[str, int]], recorded: dict[str, dict[str, int]] | None) -> list[str]:
    """What is wrong with compiled kernels, in a clause each; `recorded` is what was committed for this version of Triton, if anything."""
    wrong: list[str] = []
    for name, counts in found.items():
        limit = SHARED_MEMORY_BYTES[int(name.split()[0].removeprefix("sm_"))]
        if counts["spilled_bytes"]:
            wrong.append(f"{name}: spills {counts['spilled_bytes']} bytes")
        if counts["shared_memory_bytes"] > limit:
            wrong.append(f"{name}: {counts['shared_memory_bytes']} bytes of shared memory, at most {limit}")
        if not name.split()[1].startswith(WITHOUT_PRODUCTS) and not counts["tensor_core_instructions"]:
            wrong.append(f"{name}: no tensor-core instruction")
        if recorded is None:
            continue
        if name not in recorded:
            wrong.append(f"{name}: not in {TABLE.name}; write it anew with --write")
        elif counts["registers"] > REGISTERS_MAY_GROW * recorded[name]["registers"]:
            wrong.append(f"{name}: {counts['registers']} registers, {recorded[name]['registers']} recorded")
        elif bool(counts["tensor_core_instructions"]) != bool(recorded[name]["tensor_core_instructions"]):
            wrong.append(f"{name}: {counts['tensor_core_instructions']} tensor-core instructions, expected as in {TABLE.name}")
    if recorded is not None:
        wrong += [f"{name}: in {TABLE.name}, but no longer compiled" for name in sorted(recorded.keys() - found.keys())]
    return wrong


def recorded_for(version: str) -> dict[str, dict[str, int]] | None:
    """The committed counts for a version of Triton, or None."""
    return json.loads(TABLE.read_text()).get(version)


def _as_json(table: dict[str, dict[str, dict[str, int]]]) -> str:
    """A kernel a line, so that a change shows as one."""
    blocks: list[str] = []
    for version, kernels in sorted(table.items()):
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(counts)}" for name, counts in kernels.items())
        blocks.append(f" {json.dumps(version)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m emca_kernels.triton.inspection", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"record what was found in {TABLE.name}")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--matching", default="", metavar="TEXT", help="only kernels with this in their name, compared with nothing")
    options = parser.parse_args(arguments)
    version = importlib.metadata.version("triton")
    found = inspect_all(options.processes, options.matching)
    for name, counts in found.items():
        print(f"{name}: " + ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in counts.items()))
    if options.write and not options.matching:
        table = json.loads(TABLE.read_text()) if TABLE.is_file() else {}
        table[version] = found
        TABLE.write_text(_as_json(table))
    wrong = complaints(found, None if options.matching else recorded_for(version))
    print(*wrong, sep="\n", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
