"""Where the time of one call goes: the wall time inside of a model's parts, by hooks."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from emca_bench.models import CrossAttention
from emca_bench.models.backbones import Backbone
from emca_bench.models.mask_decoder import MaskDecoder
from emca_bench.models.pixel_decoders import PixelDecoder

PARTS: tuple[tuple[type[nn.Module], str], ...] = (
    (Backbone, "backbone"),
    (PixelDecoder, "pixel_decoder"),
    (MaskDecoder, "mask_decoder"),
    (CrossAttention, "cross_attention"),
)
"""Classes of parts. The mask decoder is given without the cross-attentions that it holds."""


@torch.inference_mode()
def component_ms(module: Any, call: Callable[[], Any], *, device: str) -> dict[str, float]:
    """Milliseconds of one call by part, `other` for the rest, label maps among it; empty where no such parts are called.

    On CUDA the device is waited for at every border, which alone makes the sum longer than the call.
    """
    modules = module.modules() if isinstance(module, nn.Module) else ()
    parts = [(part, name) for part in modules for kind, name in PARTS if isinstance(part, kind)]
    # a compiled module runs its graph, not its parts
    if not parts or hasattr(module, "_orig_mod"):
        return {}
    spent: dict[str, float] = {}
    started: dict[int, float] = {}

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return 1e3 * time.perf_counter()

    def begin(part: nn.Module, *_: Any) -> None:
        started[id(part)] = now()

    def end_of(name: str) -> Callable[..., None]:
        def end(part: nn.Module, *_: Any) -> None:
            spent[name] = spent.get(name, 0.0) + now() - started[id(part)]

        return end

    with ExitStack() as hooks:
        for part, name in parts:
            hooks.enter_context(part.register_forward_pre_hook(begin))
            hooks.enter_context(part.register_forward_hook(end_of(name)))
        before = now()
        call()
        whole = now() - before
    if not spent:
        return {}
    # the decoder's time holds that of its attentions
    spent["other"] = whole - sum(spent.get(name, 0.0) for name in ("backbone", "pixel_decoder", "mask_decoder"))
    if "mask_decoder" in spent:
        spent["mask_decoder"] -= spent.get("cross_attention", 0.0)
    return {name: round(value, 3) for name, value in spent.items()}
