"""The source of the CUDA kernels, run on a machine of host threads (cuda/machine.h), against the float64 reference."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emca_kernels import select_prototypes
from emca_kernels.select_prototypes.cuda.recipe import CUDA
from torch import Tensor

HERE = Path(__file__).parent / "cuda"
FLAGS = ("-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-pthread", f"-I{CUDA.sources}", f"-I{HERE}")
NUMBERS = {torch.bfloat16: 0, torch.float16: 1}
MASKS = {"none": 0, "bytes": 1, "words": 2}
FEW, MANY = 1, 3
"""Multiprocessors: tiles of 128 pixels in one split, and of fewer in several."""

Emulate = Callable[..., tuple[Tensor, Tensor]]

pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CXX") or "g++") is None, reason="no C++ compiler")


def compiled(source: str, folder: Path) -> Path:
    program = folder / Path(source).stem
    command = [os.environ.get("CXX") or "g++", *FLAGS, str(HERE / source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


def raw(tensor: Tensor | None) -> bytes:
    return b"" if tensor is None else bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def packed(allowed: Tensor) -> Tensor:
    """Bool [B, Q, P] as bits [B, Q, ceil(P / 32), 4 bytes]; those beyond P are set, and must not count."""
    bits = torch.nn.functional.pad(allowed, (0, -allowed.shape[-1] % 32), value=True).unflatten(-1, (-1, 4, 8))
    return (bits.int() << torch.arange(8)).sum(-1).to(torch.uint8)


def spaced(rows: Tensor, room: int) -> Tensor:
    """The same rows with `room` NaN behind each."""
    return torch.nn.functional.pad(rows, (0, room), value=torch.nan)


@pytest.fixture(scope="module")
def emulate(tmp_path_factory: pytest.TempPathFactory) -> Emulate:
    program = compiled("emulate.cpp", tmp_path_factory.mktemp("cuda"))

    def call(
        features: Tensor, queries: Tensor, allowed: Tensor | None, position: Tensor | None, kind: str, processors: int, late: bool, seed: int
    ) -> tuple[Tensor, Tensor]:
        (images, pixels, channels), asked, room = features.shape, queries.shape[1], 8
        shared = 0 if position is None else len(position)
        numbers = (NUMBERS[features.dtype], images, pixels, asked, channels, channels + room, shared, MASKS[kind], processors, late, seed)
        mask = None if allowed is None else packed(allowed) if kind == "words" else allowed
        given = struct.pack("11i", *numbers) + raw(spaced(features, room)) + raw(queries) + raw(position) + raw(mask)
        done = subprocess.run([str(program)], input=given, capture_output=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr.decode()
        count = images * asked
        indices = torch.frombuffer(bytearray(done.stdout[: 8 * count]), dtype=torch.int64)
        scores = torch.frombuffer(bytearray(done.stdout[8 * count :]), dtype=torch.float32)
        return indices.view(images, asked, 1, 1), scores.view(images, asked, 1, 1)

    return call


def masks(kind: str, queries: int, pixels: int) -> Tensor | None:
    """None, or bool [2, Q, P] with empty and full rows, and rows that allow a single pixel."""
    if kind == "none":
        return None
    allowed = torch.rand(2, queries, pixels) < 0.2
    allowed[0, ::3] = False
    allowed[1, 1::4] = True
    allowed[1, ::4] = False
    allowed[1, ::4, -1] = True
    return allowed


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", NUMBERS)
def test_ties_empty_and_full_masks_choose_as_the_reference(emulate: Emulate, dtype: torch.dtype, kind: str, late: bool, seed: int) -> None:
    """Small integers: exact sums and many ties. Each run draws other sizes; every size of tile, one and two groups and blocks of queries."""
    draw = random.Random(seed)
    for pixels, processors in ((draw.choice((1, 7, 31, 100)), MANY), (draw.choice((255, 264, 300)), draw.choice((FEW, MANY))), (130, 8)):
        queries, channels = draw.choice((1, 15, 37, 64, 100, 130)), draw.choice((64, 128, 192, 256))
        features, asked = torch.randint(-3, 4, (2, pixels, channels)).to(dtype), torch.randint(-3, 4, (2, queries, channels)).to(dtype)
        allowed = masks(kind, queries, pixels)
        position = draw.choice((None, torch.randint(-2, 3, (draw.choice((1, 2)), pixels, channels)).to(dtype)))
        source = features.double() if position is None else features.double() + position.double()
        wanted = select_prototypes(source, asked.double(), allowed, backend="reference")
        found = emulate(features, asked, allowed, position, kind, processors, late, seed)
        assert torch.equal(found[0], wanted[0]), (pixels, queries, channels, processors)
        assert torch.equal(found[1].double(), wanted[1])
