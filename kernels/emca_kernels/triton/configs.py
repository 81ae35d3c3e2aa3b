"""Tile sizes per architecture, committed: nothing is tuned at run time, and a new size of image compiles no new kernel.

The table is `configs.json`, by operator and coarse keys. Every entry is to compile without spills and within the architecture's shared
memory, which `tests_triton/compile` checks; `python -m emca_kernels.triton.tune` chooses anew on a machine with a GPU.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

TABLE = Path(__file__).parent / "configs.json"

SHARED_MEMORY_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""What one block may use."""

PROCESSORS = {80: 108, 90: 132}
"""Of an A100 and an H100. Constants, not the device's count: sums of soft prototypes are merged per program, and the same call gives
the same bits on every device of an architecture."""


@dataclass(frozen=True)
class Config:
    """Tiles of one kernel."""

    block_q: int
    """Most queries of a program."""
    block_p: int
    """Pixels of a tile."""
    resident: int
    """Widest rows that are multiplied in one piece, queries staying on chip; wider ones go by pieces of `piece` channels."""
    piece: int
    num_warps: int
    num_stages: int


def power_of_two(size: int, least: int = 16) -> int:
    """The next power of two, 16 at least: the smallest side of a product of tiles."""
    return max(least, 1 << (size - 1).bit_length())


def block_of(count: int, most: int) -> int:
    """Queries of a program: 16, 64 or `most`, so that few kernels serve all counts."""
    return min(most, next(block for block in (16, 64, 128) if count <= block or block == 128))


Key = tuple[int, str, str]
"""Architecture, "half" or "float", and the scope: how many matrices are streamed, or how wide they are."""


@functools.cache
def tables() -> dict[str, dict[Key, Config]]:
    """All entries, by operator."""
    return parse_tables(TABLE.read_text())


def parse_tables(text: str) -> dict[str, dict[Key, Config]]:
    """What `format_tables` wrote."""
    found: dict[str, dict[Key, Config]] = {}
    for operator, entries in json.loads(text).items():
        for name, sizes in entries.items():
            architecture, kind, scope = name.split(" ")
            found.setdefault(operator, {})[int(architecture), kind, scope] = Config(**sizes)
    return found


def format_tables(of: Mapping[str, Mapping[Key, Config]]) -> str:
    """JSON with an entry a line, so that a change shows as one."""
    blocks: list[str] = []
    for operator, entries in sorted(of.items()):
        named = sorted((" ".join(map(str, key)), json.dumps(asdict(config))) for key, config in entries.items())
        lines = ",\n".join(f"  {json.dumps(name)}: {sizes}" for name, sizes in named)
        blocks.append(f" {json.dumps(operator)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def config_of(operator: str, architecture: int, dtype: torch.dtype, scope: str) -> Config:
    """The entry of an operator's table."""
    return tables()[operator][architecture, "float" if dtype == torch.float32 else "half", scope]


class Shares(NamedTuple):
    """How a launch that streams pixels is shared among programs."""

    block_q: int
    """Queries of a program."""
    blocks_q: int
    splits: int
    """Programs that share the pixels of one image and block of queries."""
    span: int
    """Pixels of each."""


def shares_of(
    config: Config, queries: int, pixels: int, beside: int, architecture: int, splits: int | None = None, *, per_processor: int = 2
) -> Shares:
    """`beside`: programs of the launch that see the same queries and the same span; for the rest see `splits_of`."""
    block_q = block_of(queries, config.block_q)
    blocks_q = -(-queries // block_q)
    return Shares(
        block_q, blocks_q, *splits_of(pixels, config.block_p, beside * blocks_q, architecture, splits, per_processor=per_processor)
    )


def splits_of(
    pixels: int, block_p: int, programs: int, architecture: int, splits: int | None = None, *, per_processor: int = 2
) -> tuple[int, int]:
    """(splits, pixels of each): how many programs share the pixels of one image and block of queries; none is left without a tile.

    Args:
        programs: of the launch, were no pixels shared.
        splits: as many as these instead, as far as there are tiles.
        per_processor: how many programs of the launch each processor of the device should get.
    """
    tiles = -(-pixels // block_p)
    wanted = max(1, min(tiles, splits or per_processor * PROCESSORS[architecture] // programs))
    span = -(-tiles // wanted) * block_p
    return -(-pixels // span), span
