"""Reproducible benchmark and ablation suite for efficient masked cross-attention (EMCA) in Mask2Former."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emca_bench.deploy import optimize as optimize

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`emca_bench.optimize`, without torch before it is asked for."""
    if name == "optimize":
        from emca_bench.deploy import optimize

        return optimize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
