"""What fvcore, the counter of most papers, says of the same call: its rules on the meta device, where fvcore itself cannot trace.

fvcore counts norms, resizes and samples, and drops operators that it does not know: the scores of masked attention in
`nn.MultiheadAttention` (`baddbmm`), all of `scaled_dot_product_attention`, and operators of other libraries, `emca_kernels`
among them; deformable attention is counted as the samples that it stands for. It counts multiply-adds and calls them flops. Its
trace also leaves out what no result depends on, such as the class heads of earlier layers in evaluation; that is counted here.

Source: fvcore 0.1.5, `fvcore.nn.FlopCountAnalysis` with its default handles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, bmm_flop, flop_registry

aten = torch.ops.aten

Shape = torch.Size
FLOPS_A_MAC = 2


def _batch_norm(features: Shape, weight: Shape | None, *rest: Any, out_shape: Any, **_: Any) -> int:
    return FLOPS_A_MAC * prod(features) * (1 if weight is None else 2)


def _layer_norm(features: Shape, normalized: Any, weight: Shape | None, *rest: Any, out_shape: Any, **_: Any) -> int:
    return FLOPS_A_MAC * prod(features) * (4 if weight is None else 5)


def _group_norm(features: Shape, weight: Shape | None, *rest: Any, out_shape: Any, **_: Any) -> int:
    return FLOPS_A_MAC * prod(features) * (4 if weight is None else 5)


def _four_a_sample(*inputs: Any, out_shape: Shape, **_: Any) -> int:
    return FLOPS_A_MAC * 4 * prod(out_shape)


def _one_a_sample(*inputs: Any, out_shape: Shape, **_: Any) -> int:
    return FLOPS_A_MAC * prod(out_shape)


ADDED: dict[Any, Callable[..., int]] = {
    aten.native_batch_norm: _batch_norm,
    aten.native_layer_norm: _layer_norm,
    aten.native_group_norm: _group_norm,
    aten.upsample_bilinear2d: _four_a_sample,
    aten.upsample_nearest2d: _one_a_sample,
    aten.grid_sampler_2d: _four_a_sample,
}
"""Operators that fvcore counts and torch's counter does not, in evaluation mode."""

SAMPLES = ("deformable_attention", "deformable_attention_from_offsets")
"""Own operators that fvcore would know as `grid_sample`, four multiply-adds a sample; their own formulas say the same."""


class FvcoreRules(TorchFunctionMode):
    """Counts a call as fvcore does.

    Attributes:
        counter: multiply-adds times two, by module and operator.
        dropped: multiply-adds that torch's counter sees and fvcore does not, by operator.
    """

    def __init__(self) -> None:
        super().__init__()
        own = [packet for packet in flop_registry if str(packet).startswith("emca.") and packet.__name__ not in SAMPLES]
        foreign = {packet: self._dropping(packet) for packet in own}
        rules = {**ADDED, **foreign, aten.bmm: self._bmm, aten.baddbmm: self._baddbmm}
        # the counter looks up packets, but takes an operator apart unless its overload is known
        whole = {getattr(packet, name): rule for packet, rule in rules.items() for name in packet.overloads()}
        self.counter = FlopCounterMode(display=False, custom_mapping={**rules, **whole})
        self.dropped: Counter[str] = Counter()
        self._fused = 0

    def __enter__(self) -> FvcoreRules:
        self.counter.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        self.counter.__exit__(*failure)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # a mode does not see what a function that it handles calls
        fused = func is F.scaled_dot_product_attention
        fused |= func is F.multi_head_attention_forward and not (kwargs or {}).get("need_weights", True)
        self._fused += fused
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._fused -= fused

    def _bmm(self, left: Shape, right: Shape, *rest: Any, out_shape: Any = None, **_: Any) -> int:
        flops = bmm_flop(left, right)
        if not self._fused:
            return flops
        self.dropped["scaled_dot_product_attention"] += flops // FLOPS_A_MAC
        return 0

    def _baddbmm(self, added: Shape, left: Shape, right: Shape, *rest: Any, out_shape: Any = None, **_: Any) -> int:
        self.dropped["scaled_dot_product_attention" if self._fused else "baddbmm"] += bmm_flop(left, right) // FLOPS_A_MAC
        return 0

    def _dropping(self, packet: Any) -> Callable[..., int]:
        count = flop_registry[packet]

        def drop(*shapes: Any, out_val: Any = None, **rest: Any) -> int:
            self.dropped[packet.__name__] += count(*shapes, out_val=out_val, **rest) // FLOPS_A_MAC
            return 0

        # the counter hands tensors, not shapes, to a function with this mark, as registered ones have it
        drop._get_raw = True  # type: ignore[attr-defined]
        return drop

    @property
    def macs(self) -> int:
        """Multiply-adds of the whole call."""
        return self.counter.get_total_flops() // FLOPS_A_MAC

    @property
    def added(self) -> dict[str, int]:
        """Multiply-adds that fvcore sees and torch's counter does not, by operator."""
        counts = self.counter.get_flop_counts().get("Global", {})
        return {packet.__name__: flops // FLOPS_A_MAC for packet, flops in counts.items() if packet not in flop_registry}
