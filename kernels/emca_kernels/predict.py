"""What the targets' calls should take on a GPU that is not at hand: a bound from bytes, operations and launches. Predicted, not measured.

    python -m emca_kernels.predict                     for an H200
    python -m emca_kernels.predict --bandwidth 3.35    for another, in TB/s

A pass over memory takes the longer of its bytes at the copy rate and its operations at the attainable rate of tensor cores. Launches are
paid one after the other. Caches, tails of waves and the latency of dependent loads are not in the model: real kernels take longer.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from math import ceil

from emca_kernels.specs import MASK_BYTES, SELECT_PROTOTYPES, Sizes

BLOCK_Q = 128
"""Queries that a program projects and folds for itself, padding included."""
HEADS = 8
"""Of masked cross-attention."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Ceilings. The defaults are an H200 SXM: bandwidth, bfloat16 rate and processors by NVIDIA's data sheet, the rest assumed."""

    bandwidth: float = 4.8e12
    """Bytes per second by the data sheet."""
    copy_efficiency: float = 0.9
    """Share of it that a large copy reaches."""
    tensor_rate: float = 989e12
    """Dense bfloat16 operations per second by the data sheet."""
    tensor_efficiency: float = 0.8
    """Share of it that a large matrix product reaches."""
    processors: int = 132
    launch_s: float = 3e-6
    """From one kernel's end to the next one's first work."""

    @property
    def copy_rate(self) -> float:
        """Bytes per second of a large copy."""
        return self.bandwidth * self.copy_efficiency

    def pass_s(self, nbytes: float, flops: float) -> float:
        """Seconds of one kernel that overlaps its traffic with its products, without its launch."""
        return max(nbytes / self.copy_rate, flops / (self.tensor_rate * self.tensor_efficiency))


def selection_s(sizes: Sizes, machine: Machine) -> float:
    """Two launches: one pass over features and mask, with the queries padded to a block, and a merge."""
    padded = ceil(sizes.queries / BLOCK_Q) * BLOCK_Q / sizes.queries
    return 2 * machine.launch_s + machine.pass_s(SELECT_PROTOTYPES.bytes(sizes), padded * SELECT_PROTOTYPES.flops(sizes))


def layer_s(sizes: Sizes, machine: Machine) -> float:
    """The same, and in front of every program its projection and fold, which no other work of its processor hides.

    The second launch's three products wait for weights: their traffic is counted once per program.
    """
    folding = 2 * 2 * BLOCK_Q * sizes.width**2 / (machine.tensor_rate * machine.tensor_efficiency / machine.processors)
    programs = ceil(sizes.batch * sizes.queries / 16)
    rest = machine.pass_s(programs * 3 * sizes.width**2 * sizes.itemsize, 0)
    return selection_s(sizes, machine) + folding + rest


def masked_s(sizes: Sizes, machine: Machine) -> float:
    """Masked cross-attention as published, eager: keys, values, scores, softmax, products, mean of the weights; 12 launches."""
    pixels, width = sizes.batch * sizes.pixels, sizes.width
    matrix, scores = pixels * width * sizes.itemsize, HEADS * pixels * sizes.queries * sizes.itemsize
    projecting = 2 * machine.pass_s(2 * matrix, 2 * pixels * width**2)
    mask = HEADS * pixels * sizes.queries * MASK_BYTES
    products = 2 * machine.pass_s(matrix + scores, 2 * pixels * sizes.queries * width)
    # bool mask repeated per head and turned into numbers, added, softmax, mean
    return 12 * machine.launch_s + projecting + products + machine.pass_s(2 * mask + scores, 0) + machine.pass_s(7 * scores, 0)


def fused_s(sizes: Sizes, machine: Machine) -> float:
    """Its fused form at its best: keys and values written and read once, no scores; 6 launches."""
    pixels, width = sizes.batch * sizes.pixels, sizes.width
    matrix = pixels * width * sizes.itemsize
    mask = pixels * sizes.queries * MASK_BYTES
    projecting = 2 * machine.pass_s(2 * matrix, 2 * pixels * width**2)
    return 6 * machine.launch_s + projecting + machine.pass_s(2 * matrix + mask, 4 * pixels * sizes.queries * width)


def table(machine: Machine) -> str:
    """Markdown: a row for each cell of the targets."""
    lines = [
        "| B | pixels | selection | share of the copy rate | EMCA layer | against published | against fused |",
        "|---|---|---|---|---|---|---|",
    ]
    for batch, height, width in ((1, 64, 64), (1, 128, 256), (4, 128, 256), (16, 128, 256)):
        sizes = Sizes(batch=batch, pixels=height * width, queries=100, width=256, itemsize=2)
        selection, layer = selection_s(sizes, machine), layer_s(sizes, machine)
        share = SELECT_PROTOTYPES.bytes(sizes) / selection / machine.copy_rate
        versus = [f"{rival(sizes, machine) / layer:.1f}x" for rival in (masked_s, fused_s)]
        cells = (batch, f"{height}x{width}", f"{1e6 * selection:.0f} us", f"{100 * share:.0f} %", f"{1e6 * layer:.0f} us", *versus)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m emca_kernels.predict", description=(__doc__ or "").splitlines()[0])
    default = Machine()
    options = {
        "bandwidth": (default.bandwidth / 1e12, 1e12, "TB/s by the data sheet"),
        "copy-efficiency": (default.copy_efficiency, 1.0, "share of it that a copy reaches"),
        "tensor-rate": (default.tensor_rate / 1e12, 1e12, "dense bfloat16 TFLOP/s by the data sheet"),
        "tensor-efficiency": (default.tensor_efficiency, 1.0, "share of it that a product reaches"),
        "processors": (default.processors, 1, "streaming multiprocessors"),
        "launch": (default.launch_s * 1e6, 1e-6, "microseconds a launch"),
    }
    for name, (value, _, text) in options.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, metavar="N", help=f"{text}; {value:g}")
    given = vars(parser.parse_args(arguments))
    fields = {name.replace("-", "_"): given[name.replace("-", "_")] * unit for name, (_, unit, _) in options.items()}
    fields["launch_s"] = fields.pop("launch")
    wrong = [name for name, value in fields.items() if not value > 0]
    if wrong:
        parser.error(f"{wrong[0]} is {fields[wrong[0]]:g}, expected a number above zero")
    machine = Machine(**fields)
    print("Predicted, not measured: Q=100, C=256, bfloat16, a bool mask;", machine)
    print(table(machine))


if __name__ == "__main__":
    main()
