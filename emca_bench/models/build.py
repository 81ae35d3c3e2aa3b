"""Models by name: every number of an architecture on one screen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from emca_bench.errors import UsageError, did_you_mean, listing
from emca_bench.models.attention import CrossAttention, build_attention
from emca_bench.models.backbones import BACKBONES
from emca_bench.models.mask2former import Mask2Former
from emca_bench.models.mask_decoder import MaskDecoder
from emca_bench.models.mask_use import MaskUse
from emca_bench.models.pixel_decoders import PIXEL_DECODERS
from emca_bench.registry import Registry

NUMBERS = ("width", "queries", "layers", "heads", "feedforward_multiple", "pre_norm", "mask_source", "mask_rule")
"""Fields of an architecture that a caller may override; so may it the options of its backbone and pixel decoder."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a model is made of.

    Attributes:
        about: one sentence for listings.
        backbone, pixel_decoder: registry names.
        backbone_options, pixel_decoder_options: all that their factories take, with this model's values.
        width: C.
        queries: Q.
        layers: of the mask decoder.
        heads: of its self-attention.
        feedforward_multiple: hidden width of its feed-forward networks, in C.
        pre_norm, mask_source, mask_rule: see `MaskDecoder`.
        attention: registry name of the cross-attention unless the caller names another.
    """

    about: str
    backbone: str
    pixel_decoder: str
    backbone_options: Mapping[str, Any] = field(default_factory=dict)
    pixel_decoder_options: Mapping[str, Any] = field(default_factory=dict)
    width: int
    queries: int
    layers: int
    heads: int = 8
    feedforward_multiple: int
    pre_norm: bool = False
    mask_source: str = "logits"
    mask_rule: str = "threshold"
    attention: str = "emca"


MODELS: Registry[Architecture] = Registry("model")

MODELS.register("mask2former_r50")(
    Architecture(
        about="Mask2Former with ResNet-50: 44.0 M parameters.",
        backbone="resnet50",
        backbone_options={"norm": "frozen"},
        pixel_decoder="msdeform",
        pixel_decoder_options={"encoder_layers": 6},
        width=256,
        queries=100,
        layers=9,
        feedforward_multiple=8,
    )
)

_SWIN_ABOUT = {
    "tiny": "Mask2Former with Swin-T: 47.4 M parameters.",
    "small": "Mask2Former with Swin-S: 68.8 M parameters.",
    "base": "Mask2Former with Swin-B, windows of 12 pixels: 106.9 M parameters.",
    "large": "Mask2Former with Swin-L, windows of 12 pixels: 215.5 M parameters.",
}

for _size, _about in _SWIN_ABOUT.items():
    MODELS.register(f"mask2former_swin_{_size}")(
        replace(MODELS["mask2former_r50"], about=_about, backbone=f"swin_{_size}", backbone_options={"drop_path_rate": 0.3})
    )

MODELS.register("pem_r50")(
    Architecture(
        about="PEM with ResNet-50 as its code has it: 35.6 M parameters. double_sigmoid=False and attention `pem_ca` mend it.",
        backbone="resnet50",
        backbone_options={"norm": "batch"},
        pixel_decoder="csm_fpn",
        pixel_decoder_options={"conv_width": 128, "double_sigmoid": True, "upsample_init": "first_channel"},
        width=256,
        queries=100,
        layers=6,
        feedforward_multiple=8,
        pre_norm=True,
        attention="pem_ca_published",
    )
)

MODELS.register("mask2former_lite0")(
    Architecture(
        about="An edge model: EfficientNet-Lite0 (`pretrained` on ImageNet, `frozen`), feature pyramid.",
        backbone="tf_efficientnet_lite0",
        backbone_options={"pretrained": False, "frozen": False},
        pixel_decoder="fpn",
        width=128,
        queries=100,
        layers=6,
        feedforward_multiple=4,
    )
)

MODELS.register("mask2former_tiny")(
    Architecture(
        about="Small enough to train from scratch on a CPU.",
        backbone="resnet10_quarter",
        pixel_decoder="fpn",
        width=64,
        queries=20,
        layers=3,
        feedforward_multiple=4,
    )
)


def build_model(
    name: str,
    *,
    num_classes: int,
    attention: str | None = None,
    attention_switches: Mapping[str, Any] | None = None,
    attention_layers: str = "all",
    other_attention: str = "masked_fused",
    mask_use: str = "always",
    **overrides: Any,
) -> Mask2Former:
    """A model by its registry name, with random weights unless a pretrained backbone is asked for.

    Args:
        name: "mask2former_r50", "mask2former_swin_tiny", "pem_r50", "mask2former_lite0", "mask2former_tiny", ...
        num_classes: without "no object".
        attention: registry name of the cross-attention; None: the model's own, "emca" in Mask2Former.
        attention_switches: of the attention, see its factory.
        attention_layers: decoder layers that have this attention: "all", or numbers from 0 and ranges, as in "0-2,5". Layer i attends to
            stride 32, 16 or 8 in turn, so that "2,5,8" are the layers of stride 8.
        other_attention: registry name of the attention of all other layers.
        mask_use: "always"; "never" lets all cross-attentions look everywhere, "annealed" takes their masks away in the course of training.
        overrides: of the architecture's numbers (queries, layers, width, mask_source, ...) and of its parts' options.

    Raises:
        UsageError: an unknown name or override, or a value that does not fit.
    """
    architecture = _overridden(name, MODELS[name], overrides)
    width = architecture.width
    if width < 1 or width % architecture.heads:
        raise UsageError(f"width={width} must be a multiple of the {architecture.heads} heads")

    chosen = parse_layers(attention_layers, architecture.layers)
    layers = iter(range(architecture.layers))

    def cross_attention() -> CrossAttention:
        if next(layers) not in chosen:
            return build_attention(other_attention, width=width)
        return build_attention(architecture.attention if attention is None else attention, width=width, **(attention_switches or {}))

    backbone = BACKBONES[architecture.backbone](**architecture.backbone_options)
    make_pixel_decoder = PIXEL_DECODERS[architecture.pixel_decoder]
    pixel_decoder = make_pixel_decoder(channels=backbone.channels, width=width, **architecture.pixel_decoder_options)
    model = Mask2Former(
        backbone=backbone,
        pixel_decoder=pixel_decoder,
        predictor=MaskDecoder(
            attention=cross_attention,
            width=width,
            classes=num_classes,
            queries=architecture.queries,
            layers=architecture.layers,
            heads=architecture.heads,
            feedforward=architecture.feedforward_multiple * width,
            pre_norm=architecture.pre_norm,
            pyramid_channels=pixel_decoder.pyramid_channels,
            mask_source=architecture.mask_source,
            mask_rule=architecture.mask_rule,
        ),
    )
    use = MaskUse(mask_use)
    if mask_use == "never" and architecture.mask_rule != "threshold":
        raise UsageError(f"mask_rule={architecture.mask_rule!r} with mask_use='never': expected threshold, nothing reads the masks")
    if mask_use != "always":
        use.attach(model)
        model.mask_use = use
    return model


def parse_layers(text: str, layers: int) -> frozenset[int]:
    """`"0-2,5"` to layer numbers, `"all"` to every one of `layers`.

    Raises:
        UsageError: not of this form, or a layer that is not there.
    """
    if text == "all":
        return frozenset(range(layers))
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(first) > int(last or first):
            raise UsageError(f"attention_layers={text!r}; expected 'all', or numbers from 0 and ranges as in '0-2,5'")
        found.update(range(int(first), int(last or first) + 1))
    if max(found) >= layers:
        raise UsageError(f"attention_layers={text!r} names layer {max(found)}; expected 0..{layers - 1}, the decoder has {layers} layers")
    return frozenset(found)


def _overridden(name: str, architecture: Architecture, overrides: Mapping[str, Any]) -> Architecture:
    options = ("backbone_options", "pixel_decoder_options")
    homes: dict[str, str | None] = dict.fromkeys(NUMBERS)
    homes |= {option: home for home in options for option in getattr(architecture, home)}
    for override, value in overrides.items():
        if override not in homes:
            raise UsageError(f"model {name!r} has no override {override!r}{did_you_mean(override, homes)}; known: {listing(homes)}")
        home = homes[override]
        changed = {override: value} if home is None else {home: {**getattr(architecture, home), override: value}}
        architecture = replace(architecture, **changed)
    return architecture
