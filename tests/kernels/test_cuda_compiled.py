"""What the CUDA kernels become on the chip, against cuda/resources.json; no device is needed.

After a wanted change: EMCA_UPDATE_RESOURCES=1 pytest tests/kernels/test_cuda_compiled.py, and look at the difference.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from emca_kernels.build import BuildError
from emca_kernels.select_prototypes.cuda.recipe import CUDA, compile_command, find_nvcc

TABLE = Path(__file__).parent / "cuda" / "resources.json"
NUMBERS, MASKS = ("bfloat16", "float16"), ("none", "bytes", "words")
REGISTERS = 65536
"""Of a multiprocessor of compute capability 9.0."""
THREADS = 2 * 128 + 32


def find(tool: str) -> str | None:
    """A tool of the CUDA toolkit, or the copy that comes with triton."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(triton.origin).parent / "backends/nvidia/bin"] if triton is not None and triton.origin else []
    return shutil.which(tool) or next((str(folder / tool) for folder in folders if (folder / tool).is_file()), None)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The code of all kernels for the chip, and what the assembler said."""
    try:
        command = compile_command(find_nvcc())
    except BuildError as error:
        pytest.skip(str(error))
    cubin = tmp_path_factory.mktemp("cuda") / "launch.cubin"
    options = ["-Xptxas", "-v", "-cubin", "-o", str(cubin)]
    done = subprocess.run([*command, *options, str(CUDA.sources / "launch.cu")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return cubin, done.stdout + done.stderr


def readable(symbol: str) -> str:
    """A mangled name as in the table."""
    splits = re.search(r"best_of_splitsILNS\d_6NumberE(\d)ELi(\d+)ELNS\d_4MaskE(\d)E", symbol)
    if splits is not None:
        return f"best_of_splits<{NUMBERS[int(splits[1])]}, {splits[2]}, {MASKS[int(splits[3])]}>"
    every = re.search(r"best_of_allILNS\d_6NumberE(\d)E", symbol)
    assert every is not None, symbol
    return f"best_of_all<{NUMBERS[int(every[1])]}>"


def resources(said: str) -> dict[str, dict[str, int]]:
    """Registers and bytes of local memory of each kernel."""
    found = {}
    for part in said.split("Compiling entry function '")[1:]:
        stack, stores, loads = (int(word) for word in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", part)[:3])
        registers = re.search(r"Used (\d+) registers", part)
        assert registers is not None, part
        found[readable(part.split("'", 1)[0])] = {"registers": int(registers[1]), "local_bytes": stack + stores + loads}
    return found


def instructions(cubin: Path) -> dict[str, dict[str, int]]:
    """How often each kernel multiplies on tensor cores, copies by TMA, and touches local memory."""
    disassembler = find("nvdisasm")
    if disassembler is None:
        pytest.skip("no nvdisasm: it comes with the CUDA toolkit or with triton")
    listing = subprocess.run([disassembler, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    found = {}
    for part in re.split(r"^\.text\.", listing, flags=re.MULTILINE)[1:]:
        names = Counter(re.findall(r"\b(HGMMA|UTMALDG|LDL|STL)\b", part))
        found[readable(part.split(":", 1)[0])] = {name: names[name] for name in ("HGMMA", "UTMALDG", "LDL", "STL")}
    return found


@pytest.fixture(scope="module")
def table(compiled: tuple[Path, str]) -> dict[str, dict[str, int]]:
    """What is expected of each kernel."""
    if os.environ.get("EMCA_UPDATE_RESOURCES"):
        found, counts = resources(compiled[1]), instructions(compiled[0])
        TABLE.write_text(json.dumps({name: found[name] | counts[name] for name in sorted(found)}, indent=2) + "\n")
    return json.loads(TABLE.read_text())


def test_registers_are_those_of_the_table(compiled: tuple[Path, str], table: dict[str, dict[str, int]]) -> None:
    """No spills anywhere, and no kernel a tenth above its registers: other versions of the assembler differ a little."""
    found = resources(compiled[1])
    assert found.keys() == table.keys()
    for name, used in found.items():
        assert used["local_bytes"] == table[name]["local_bytes"] == 0, name
        assert used["registers"] <= 1.1 * table[name]["registers"], name
        assert used["registers"] * THREADS <= REGISTERS, name


def test_the_assembler_does_not_wait_between_products(compiled: tuple[Path, str]) -> None:
    """It says so where it has to serialise wgmma or to add a fence of its own."""
    assert not re.findall(r".*\(C75\d\d\).*", compiled[1])


def test_products_are_made_by_tensor_cores_and_copies_by_tma(compiled: tuple[Path, str], table: dict[str, dict[str, int]]) -> None:
    """Four products of 16 channels to a panel; a copy of queries and one of pixels at least, how often depends on the compiler's loops."""
    counts = instructions(compiled[0])
    assert counts.keys() == table.keys()
    for name, count in counts.items():
        splits = name.startswith("best_of_splits")
        assert count["HGMMA"] == table[name]["HGMMA"] == (4 if splits else 0), name
        assert (count["UTMALDG"] >= 2) == (table[name]["UTMALDG"] >= 2) == splits, name
        assert count["LDL"] == count["STL"] == 0, name
