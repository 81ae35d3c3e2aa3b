"""Models by name: every number of an architecture on one screen."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from emca_bench.errors import UsageError, did_you_mean, listing
from emca_bench.models.attention import CrossAttention, build_attention
from emca_bench.models.backbones import BACKBONES
from emca_bench.models.mask2former import Mask2Former
from emca_bench.models.mask_decoder import MaskDecoder
from emca_bench.models.pixel_decoders import PIXEL_DECODERS
from emca_bench.registry import Registry

MODELS: Registry[Callable[..., Mask2Former]] = Registry("model")


def build_model(name: str, *, num_classes: int, attention: str = "emca", **overrides: Any) -> Mask2Former:
    """A model by its registry name, with random weights unless a pretrained backbone is asked for.

    Args:
        name: "mask2former_r50", "mask2former_lite0", "mask2former_tiny", ...
        num_classes: without "no object".
        attention: registry name of the cross-attention.
        overrides: of the model's numbers (queries, layers, width, mask_source, ...); `attention_switches` goes to the attention.

    Raises:
        UsageError: an unknown name or override, or a value that does not fit.
    """
    factory = MODELS[name]
    known = [parameter for parameter in inspect.signature(factory).parameters if parameter not in ("num_classes", "attention")]
    for override in overrides:
        if override not in known:
            raise UsageError(f"model {name!r} has no override {override!r}{did_you_mean(override, known)}; known: {listing(known)}")
    return factory(num_classes=num_classes, attention=attention, **overrides)


def _assemble(
    *,
    backbone: str,
    backbone_options: Mapping[str, Any],
    pixel_decoder: str,
    pixel_decoder_options: Mapping[str, Any],
    num_classes: int,
    attention: str,
    attention_switches: Mapping[str, Any] | None,
    width: int,
    queries: int,
    layers: int,
    heads: int,
    feedforward: int,
    mask_source: str,
) -> Mask2Former:
    if width < 1 or width % heads:
        raise UsageError(f"width={width} must be a multiple of the {heads} heads")

    def cross_attention() -> CrossAttention:
        return build_attention(attention, width=width, **(attention_switches or {}))

    body = BACKBONES[backbone](**backbone_options)
    return Mask2Former(
        backbone=body,
        pixel_decoder=PIXEL_DECODERS[pixel_decoder](channels=body.channels, width=width, **pixel_decoder_options),
        predictor=MaskDecoder(
            attention=cross_attention,
            width=width,
            classes=num_classes,
            queries=queries,
            layers=layers,
            heads=heads,
            feedforward=feedforward,
            mask_source=mask_source,
        ),
    )


@MODELS.register("mask2former_r50")
def mask2former_r50(
    *,
    num_classes: int,
    attention: str,
    attention_switches: Mapping[str, Any] | None = None,
    width: int = 256,
    queries: int = 100,
    layers: int = 9,
    encoder_layers: int = 6,
    mask_source: str = "logits",
    backbone_norm: str = "frozen",
) -> Mask2Former:
    """Mask2Former with ResNet-50: 44.0 M parameters."""
    return _assemble(
        backbone="resnet50",
        backbone_options={"norm": backbone_norm},
        pixel_decoder="msdeform",
        pixel_decoder_options={"layers": encoder_layers},
        num_classes=num_classes,
        attention=attention,
        attention_switches=attention_switches,
        width=width,
        queries=queries,
        layers=layers,
        heads=8,
        feedforward=8 * width,
        mask_source=mask_source,
    )


@MODELS.register("mask2former_lite0")
def mask2former_lite0(
    *,
    num_classes: int,
    attention: str,
    attention_switches: Mapping[str, Any] | None = None,
    width: int = 128,
    queries: int = 100,
    layers: int = 6,
    mask_source: str = "logits",
    pretrained: bool = False,
    frozen: bool = False,
) -> Mask2Former:
    """An edge model: EfficientNet-Lite0 (`pretrained` on ImageNet, `frozen`), feature pyramid."""
    return _assemble(
        backbone="tf_efficientnet_lite0",
        backbone_options={"pretrained": pretrained, "frozen": frozen},
        pixel_decoder="fpn",
        pixel_decoder_options={},
        num_classes=num_classes,
        attention=attention,
        attention_switches=attention_switches,
        width=width,
        queries=queries,
        layers=layers,
        heads=8,
        feedforward=4 * width,
        mask_source=mask_source,
    )


@MODELS.register("mask2former_tiny")
def mask2former_tiny(
    *,
    num_classes: int,
    attention: str,
    attention_switches: Mapping[str, Any] | None = None,
    width: int = 64,
    queries: int = 20,
    layers: int = 3,
    mask_source: str = "logits",
) -> Mask2Former:
    """Small enough to train from scratch on a CPU in a minute."""
    return _assemble(
        backbone="resnet10_quarter",
        backbone_options={},
        pixel_decoder="fpn",
        pixel_decoder_options={},
        num_classes=num_classes,
        attention=attention,
        attention_switches=attention_switches,
        width=width,
        queries=queries,
        layers=layers,
        heads=8,
        feedforward=4 * width,
        mask_source=mask_source,
    )
