"""Multiply-adds by component, counted on the meta device, held against closed forms and beside what fvcore would say.

On the CPU device torch's counter drops fused attention silently; on `meta` the same call is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from emca_bench.measure.fvcore_rules import FvcoreRules
from emca_bench.measure.subjects import Subject, build_subject
from emca_bench.models import CrossAttention
from emca_bench.models.backbones import Backbone
from emca_bench.models.mask_decoder import FFNLayer, InputProjection, MaskDecoder, SelfAttentionLayer
from emca_bench.models.pixel_decoders import PixelDecoder
from emca_bench.specs import Arm

COMPONENTS: tuple[tuple[type[nn.Module], str], ...] = (
    (Backbone, "backbone"),
    (PixelDecoder, "pixel_decoder"),
    (InputProjection, "input_projection"),
    (CrossAttention, "cross_attention"),
    (SelfAttentionLayer, "self_attention"),
    (FFNLayer, "ffn"),
)
"""Modules that own what happens inside them."""

DECODER_PARTS = ("input_projection", "cross_attention", "self_attention", "ffn")
"""What is left of the mask decoder are its prediction heads."""

WORTH_NAMING = ("grid_sampler", "upsample", "softmax", "norm", "argmax", "max", "sort", "topk", "gather", "sigmoid", "pool")
"""Operators that counters give no arithmetic, and that take time: listed with the number of calls."""


class _Uncounted(TorchDispatchMode):
    """Counts the calls of operators without a FLOP formula."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        name = packet.__name__
        if packet not in flop_registry and any(part in name for part in WORTH_NAMING):
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def count_macs(arm: Arm, params: Mapping[str, Any]) -> dict[str, Any]:
    """Multiply-adds of one call of a cell's subject.

    Returns:
        macs: of the whole call. components: the same by component. closed_form_macs: of all its cross-attentions, from their own
        formulas. parameters: trainable or not, without buffers. uncounted: calls of operators that count as nothing. fvcore: the
        call by the rules of that counter, see `FvcoreRules`: macs, components, and what leads from one counter to the other, added
        and dropped multiply-adds by operator.
    """
    subject = build_subject(arm, params, seed=0, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter, FvcoreRules() as rules, _Uncounted() as uncounted:
        subject.call()
    return {
        **_totals(subject.module, counter),
        "closed_form_macs": closed_form_macs(subject),
        "parameters": sum(parameter.numel() for parameter in subject.module.parameters()),
        "uncounted": dict(sorted(uncounted.calls.items())),
        "fvcore": {
            **_totals(subject.module, rules.counter),
            "added": dict(sorted(rules.added.items())),
            "dropped": dict(sorted(rules.dropped.items())),
        },
    }


def closed_form_macs(subject: Subject) -> int:
    """Multiply-adds of all cross-attentions of one call, from their formulas (SPEC section 4)."""
    calls = zip(subject.cross_attentions(), subject.pixels_of_call, strict=True)
    return subject.batch * sum(attention.macs(pixels=pixels, queries=subject.queries) for attention, pixels in calls)


def _totals(module: nn.Module, counter: FlopCounterMode) -> dict[str, Any]:
    total = counter.get_total_flops() // 2
    components = _by_component(module, counter)
    components["other"] = total - sum(components.values())
    return {"macs": total, "components": {name: macs for name, macs in components.items() if macs}}


def _by_component(module: nn.Module, counter: FlopCounterMode) -> dict[str, int]:
    counts = counter.get_flop_counts()
    root = type(module).__name__

    def macs_inside(path: str) -> int:
        return sum(counts.get(f"{root}.{path}" if path else root, {}).values()) // 2

    components: dict[str, int] = {}
    heads = None
    for path, child in module.named_modules():
        for kind, name in COMPONENTS:
            if isinstance(child, kind):
                components[name] = components.get(name, 0) + macs_inside(path)
        if isinstance(child, MaskDecoder):
            heads = macs_inside(path)
    if heads is not None:
        components["mask_heads"] = heads - sum(components.get(name, 0) for name in DECODER_PARTS)
    return components
