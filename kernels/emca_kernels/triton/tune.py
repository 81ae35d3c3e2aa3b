"""Chooses tile sizes on a machine with a CUDA device, among a handful for each key of `configs.json`.

    python -m emca_kernels.triton.tune                      what was tried, and the fastest
    python -m emca_kernels.triton.tune --write              and writes it into configs.json, which the kernels read
    python -m emca_kernels.triton.tune --operator pool_prototypes

Afterwards `python -m emca_kernels.triton.inspection` says whether the new entries spill, in both versions of Triton, and records them.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from emca_kernels.masks import Mask
from emca_kernels.triton.configs import TABLE, Config, Key, format_tables, tables
from emca_kernels.triton.examples import example_mask
from emca_kernels.triton.runtime import architecture, missing

BATCH, PIXELS, QUERIES, WIDTH, NARROW_HEADS = 16, 128 * 256, 100, 256, 8
GAIN = 0.02
"""Share of the time that another entry must save to displace the present one: less is noise."""


def candidates(config: Config) -> Iterator[Config]:
    """The present entry, and those one step away from it in one size each."""
    yield config
    for block_q in {64, 128} - {config.block_q}:
        yield replace(config, block_q=block_q)
    for block_p in (config.block_p // 2, config.block_p * 2):
        # a word of a packed mask holds 32 pixels
        if 32 <= block_p <= 128:
            yield replace(config, block_p=block_p)
    for num_warps in {4, 8} - {config.num_warps}:
        yield replace(config, num_warps=num_warps)
    for num_stages in (config.num_stages - 1, config.num_stages + 1):
        if 1 <= num_stages <= 5:
            yield replace(config, num_stages=num_stages)


def fastest(milliseconds: Mapping[Config, float], present: Config) -> Config:
    """The fastest of those that ran, but the present one where none is clearly faster."""
    if not milliseconds:
        return present
    best = min(milliseconds, key=lambda config: milliseconds[config])
    if present in milliseconds and milliseconds[best] > (1 - GAIN) * milliseconds[present]:
        return present
    return best


def arguments_of(operator: str, key: Key, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call that uses this entry: B=16, 128x256, Q=100, C=256."""
    _, kind, scope = key
    dtype = torch.float32 if kind == "float" else torch.bfloat16
    features = torch.randn(BATCH, PIXELS, WIDTH, device=device, dtype=dtype)
    queries = torch.randn(BATCH, QUERIES, WIDTH, device=device, dtype=dtype)
    position = torch.randn(1, PIXELS, WIDTH, device=device, dtype=dtype).expand_as(features) if scope.endswith("+position") else None
    heads = NARROW_HEADS if scope == "narrow" else 1
    options = {"k": 1, "heads": heads} if operator == "select_prototypes" else {"heads": heads}
    return (features, queries, filled_mask("embedding" if scope.startswith("embedding") else "bool", features), position), options


def filled_mask(kind: str, features: Tensor) -> Mask | None:
    """Allows about half of the pixels."""
    mask = example_mask(kind, features, QUERIES)
    for tensor in vars(mask).values():
        if tensor.dtype == torch.bool:
            tensor.copy_(torch.rand(tensor.shape, device=tensor.device) < 0.5)
        else:
            tensor.normal_()
    return mask


def try_all(
    operator: str, key: Key, present: Config, time: Callable[[Callable[[], Any]], float], call: Callable[[], Any]
) -> dict[Config, float]:
    """Milliseconds of each candidate that runs; those that need more than the device has are left out, with a line that says so."""
    found: dict[Config, float] = {}
    table = tables()[operator]
    for config in candidates(present):
        table[key] = config
        try:
            found[config] = time(call)
            print(f"  {found[config]:.4f} ms {config}", flush=True)
        except Exception as error:
            # Triton's own errors (out of resources) share no base class but this one
            print(f"  does not run: {config}: {error}", flush=True)
        finally:
            table[key] = present
    return found


def on_device(call: Callable[[], Any]) -> float:
    """Median milliseconds of a call, caches cold."""
    testing = importlib.import_module("triton.testing")
    return statistics.median(testing.do_bench(call, warmup=50, rep=200, return_mode="all"))


def main(arguments: list[str] | None = None) -> int:
    """The command line; 2 without a CUDA device that there is a table for."""
    parser = argparse.ArgumentParser(prog="python -m emca_kernels.triton.tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write what was chosen into {TABLE.name}")
    parser.add_argument("--operator", choices=sorted(tables()), action="append", help="may be repeated; all by default")
    options = parser.parse_args(arguments)
    reason = missing() or (None if torch.cuda.is_available() else "kernels are interpreted, expected a CUDA device")
    device = torch.device("cuda" if reason is None else "cpu")
    if reason is None and not architecture(device):
        reason = f"{TABLE.name} has no entries for {torch.cuda.get_device_name(device)}"
    if reason is not None:
        print(f"nothing to tune on: {reason}", file=sys.stderr)
        return 2
    for operator in options.operator or sorted(tables()):
        implementation = getattr(importlib.import_module(f"emca_kernels.{operator}.triton_kernels"), operator)
        for key, present in list(tables()[operator].items()):
            if key[0] != architecture(device):
                continue
            print(operator, *key, flush=True)
            given, keywords = arguments_of(operator, key, device)
            times = try_all(operator, key, present, on_device, partial(implementation, *given, **keywords))
            tables()[operator][key] = fastest(times, present)
            print(f"  chosen: {tables()[operator][key]}", flush=True)
    if options.write:
        TABLE.write_text(format_tables(tables()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
