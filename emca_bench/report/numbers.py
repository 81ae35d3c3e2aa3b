"""Numbers and conditions as text: one rounding everywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping

from emca_bench.specs import Value, parse_size
from emca_bench.stats import Mean, Ratio

NOTHING = "—"
"""What a table shows where there is no number."""
TIMES = "\N{MULTIPLICATION SIGN}"
"""After a ratio, and between height and width."""
APART = "\N{DAGGER}"
"""After a ratio of rounds that were not interleaved."""
NOT_INTERLEAVED = (
    "Measured by different calls of run, not in the same rounds: a drift of the machine between them looks like a difference, so there "
    "is no verdict. For one, measure both in a new folder."
)


def significant(value: float, digits: int = 3) -> str:
    """At least `digits` significant digits, never an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def interval(low: float | None, high: float | None, decimals: int) -> str:
    """`[1.05, 1.21]`, or nothing where there is none."""
    if low is None or high is None:
        return ""
    return f"[{minus(f'{low:.{decimals}f}')}, {minus(f'{high:.{decimals}f}')}]"


def ratio(value: Ratio) -> str:
    """`1.13× [1.05, 1.21]`, or `1.13׆ [1.05, 1.21]` where the rounds were not interleaved."""
    decimals = 1 if value.estimate >= 10 else 2
    return f"{value.estimate:.{decimals}f}{TIMES}{'' if value.interleaved else APART} {interval(value.low, value.high, decimals)}".strip()


def milliseconds(value: Mean) -> str:
    """`0.272 [0.268, 0.276]`, without the unit."""
    decimals = max(0, 2 - math.floor(math.log10(value.estimate)))
    return f"{value.estimate:.{decimals}f} {interval(value.low, value.high, decimals)}".strip()


def points(value: Mean, *, signed: bool = False) -> str:
    """Points of an accuracy: `45.12 ± 0.31`, or with its sign and interval for a difference."""
    if signed:
        return f"{minus(f'{value.estimate:+.2f}')} {interval(value.low, value.high, 2)}".strip()
    half = "" if value.high is None else f" ± {value.high - value.estimate:.2f}"
    return f"{value.estimate:.2f}{half}"


def minus(text: str) -> str:
    """The typographic minus in front of a number."""
    return text.replace("-", "\N{MINUS SIGN}")


def gmacs(macs: float) -> str:
    """Multiply-adds in units of 1e9, with at most four decimals."""
    value = macs / 1e9
    return f"{value:.4f}" if 0 < value < 0.01 else significant(value)


def share(value: float) -> str:
    """Of a whole, in percent with at least two digits."""
    return f"{significant(100 * value, 2)} %"


def mebibytes(count: float) -> str:
    """Bytes in MiB."""
    return significant(count / 2**20)


def duration(seconds: float) -> str:
    """`45 s`, `12.5 min` or `3.2 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(text: Value) -> str:
    """`64x128` with a multiplication sign."""
    return str(text).replace("x", TIMES)


def area(text: Value) -> int:
    """Pixels of a size: 8192 of `64x128`."""
    height, width = parse_size(str(text))
    return height * width


def plural(count: int, noun: str) -> str:
    """`1 round`, `2 rounds`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


SCOPE_NAMES = {
    "kernel": "one operator",
    "attention": "one cross-attention",
    "decoder": "mask decoder",
    "model": "whole model",
    "end_to_end": "end to end",
    "training_step": "training step",
}
"""Words for what is measured."""

_PHRASES = {
    "scope": "{}",
    "op": "{}",
    "pass": "{}",
    "model": "{}",
    "dataset": "{}",
    "task": "task {}",
    "pixels": "{} pixels",
    "image_size": "{} images",
    "queries": "{} queries",
    "width": "width {}",
    "classes": "{} classes",
    "layers": "{} decoder layers",
    "mask": "{}",
    "allowed": "{} of the pixels allowed",
    "batch": "batch {}",
    "dtype": "{}",
    "device": "{}",
    "mask_source": "masks from {}",
    "mask_rule": "mask rule {}",
    "steps": "{} steps",
    "pretrained": "{}",
    "frozen": "{}",
    "learning_rate": "learning rate {}",
    "object_threshold": "object threshold {}",
    "overlap_threshold": "overlap threshold {}",
    "test_split": "evaluated on {}",
    "points": "{} points",
    "segments": "{} segments",
    "seed": "seed {}",
    "train_images": "{} training images",
    "test_images": "{} test images",
}


_SWITCHES = {"pretrained": ("from scratch", "pretrained backbone"), "frozen": ("trained backbone", "frozen backbone")}


def conditions(params: Mapping[str, Value]) -> str:
    """Parameters as a phrase: `64×64 pixels, 100 queries, width 256, float32, cpu`."""
    return ", ".join(phrase.format(_words(name, params[name])) for name, phrase in _PHRASES.items() if name in params)


PASS_NAMES = {"forward": "forward", "forward_backward": "forward and backward"}
"""Words for what a call does."""
_MASK_NAMES = {"none": "no mask", "bool": "mask of bools"}


def _words(name: str, value: Value) -> str:
    if name in _SWITCHES:
        return _SWITCHES[name][bool(value)]
    if name in ("pixels", "image_size"):
        return size(value)
    for choice, words in (("scope", SCOPE_NAMES), ("pass", PASS_NAMES), ("mask", _MASK_NAMES)):
        if name == choice:
            return words.get(str(value), str(value))
    if name == "allowed" and isinstance(value, float):
        return f"{value:.0%}"
    return "all" if name in ("train_images", "test_images") and value == 0 else str(value)
