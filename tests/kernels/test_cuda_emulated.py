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
        features: Tensor,
        queries: Tensor,
        allowed: Tensor | None,
        position: Tensor | None,
        kind: str,
        processors: int,
        late: bool,
        seed: int,
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
    """Small integers: exact sums and many ties. Each run draws other sizes, of every size of tile, number of groups and of blocks."""
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


@pytest.mark.parametrize("late", [False, True])
def test_the_ring_of_slots_goes_round_many_times(emulate: Emulate, late: bool, seed: int) -> None:
    """Five times and more, with both groups; the order of copies differs with each run."""
    features, queries = torch.randint(-3, 4, (1, 1500, 256)).bfloat16(), torch.randint(-3, 4, (1, 100, 256)).bfloat16()
    allowed = torch.rand(1, 100, 1500) < 0.1
    wanted = select_prototypes(features.double(), queries.double(), allowed, backend="reference")
    found = emulate(features, queries, allowed, None, "words", FEW, late, seed)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1].double(), wanted[1])


@pytest.mark.parametrize("dtype", NUMBERS)
def test_choices_have_no_regret(emulate: Emulate, dtype: torch.dtype, seed: int) -> None:
    """Random numbers, all scores of one query negative: the choice's float64 score is the best, where it is clear."""
    features, queries = torch.rand(2, 200, 64).to(dtype), torch.randn(2, 20, 64).to(dtype)
    queries[:, 0] = -queries[:, 0].abs() - 0.1
    exact = queries.double() @ features.double().mT
    indices, scores = emulate(features, queries, None, None, "none", MANY, True, seed)
    chosen = exact.gather(-1, indices[:, :, 0])
    assert (exact.amax(-1, keepdim=True) - chosen).max() <= 1e-5 * exact.abs().max()
    assert (scores[:, 0] < 0).all()
    torch.testing.assert_close(scores[:, :, 0].double(), chosen, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("processors", [FEW, MANY])
def test_infinities_and_nan_choose_as_torch_max(emulate: Emulate, processors: int, seed: int) -> None:
    """The first NaN wins; where nothing but -infinity is allowed, the first pixel of all stands for the query."""
    features, queries = torch.ones(2, 300, 64, dtype=torch.bfloat16), torch.zeros(2, 4, 64, dtype=torch.bfloat16)
    queries[:, :, 0], queries[:, 3, 0] = 1, -1
    features[0, [40, 250], 0], features[0, 130, 0] = torch.inf, -torch.inf
    features[1, [90, 270], 0] = torch.nan
    wanted = select_prototypes(features.double(), queries.double(), backend="reference")
    indices, scores = emulate(features, queries, None, None, "none", processors, False, seed)
    assert torch.equal(indices, wanted[0])
    torch.testing.assert_close(scores.double(), wanted[1], equal_nan=True)
    allowed = torch.zeros(2, 4, 300, dtype=torch.bool)
    allowed[0, :3, 130] = allowed[0, 3, 40] = allowed[1, 0, 5] = True
    wanted = select_prototypes(features.double(), queries.double(), allowed, backend="reference")
    indices, scores = emulate(features, queries, allowed, None, "bytes", processors, True, seed)
    assert torch.equal(indices, wanted[0])
    torch.testing.assert_close(scores.double(), wanted[1], equal_nan=True)


def test_keys_descriptors_and_plans_hold(tmp_path: Path, seed: int) -> None:
    done = subprocess.run([str(compiled("check_layout.cpp", tmp_path)), str(seed)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
