"""Tile sizes per architecture, committed: nothing is tuned at run time, and a new size of image compiles no new kernel.

Keys are coarse. Every entry compiles without spills and within the architecture's shared memory, which `compiled.json` records.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

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


def config_of(table: dict[tuple[int, str, str], Config], architecture: int, dtype: torch.dtype, scope: str) -> Config:
    """The entry of a table; `scope` tells how many matrices are streamed."""
    return table[architecture, "float" if dtype == torch.float32 else "half", scope]


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
