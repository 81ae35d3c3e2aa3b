"""Pixel decoder and mask decoder from a detectron2 configuration."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY

from emca_bench.models.attention import CrossAttention, build_attention
from emca_bench.models.mask2former import MaskFormerHead
from emca_bench.models.mask_decoder import MaskDecoder
from emca_bench.models.pixel_decoders import PIXEL_DECODERS, PixelDecoder
from emca_bench.models.pixel_decoders.msdeform import MSDeformAttnPixelDecoder

NHEADS_ATTENTIONS = ("masked", "masked_fused")
"""Cross-attentions whose heads are MODEL.MASK_FORMER.NHEADS; all others keep their preset's."""


@SEM_SEG_HEADS_REGISTRY.register()
class EMCAMaskFormerHead(MaskFormerHead):
    """`MaskFormerHead`, as detectron2 constructs it."""

    @configurable
    def __init__(self, *, pixel_decoder: PixelDecoder, predictor: MaskDecoder) -> None:
        super().__init__(pixel_decoder, predictor)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Arguments from `MODEL.SEM_SEG_HEAD` and `MODEL.MASK_FORMER`."""
        channels = {level: shape.channels for level, shape in input_shape.items()}
        pixel_decoder = build_pixel_decoder(cfg, channels)
        return {"pixel_decoder": pixel_decoder, "predictor": build_predictor(cfg, pixel_decoder.pyramid_channels)}


def build_pixel_decoder(cfg: CfgNode, channels: dict[str, int]) -> PixelDecoder:
    """Mask2Former's, or any that is registered in `emca_bench.models`, named by `MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME`."""
    head = cfg.MODEL.SEM_SEG_HEAD
    name = {"MSDeformAttnPixelDecoder": "msdeform", "BasePixelDecoder": "fpn"}.get(head.PIXEL_DECODER_NAME, head.PIXEL_DECODER_NAME)
    if name == "msdeform":
        return MSDeformAttnPixelDecoder(
            channels=channels, width=head.CONVS_DIM, layers=head.TRANSFORMER_ENC_LAYERS, heads=cfg.MODEL.MASK_FORMER.NHEADS
        )
    return PIXEL_DECODERS[name](channels=channels, width=head.CONVS_DIM)


def build_predictor(cfg: CfgNode, pyramid_channels: int | None = None) -> MaskDecoder:
    """The mask decoder with the cross-attention of `MODEL.MASK_FORMER.CROSS_ATTENTION`, for maps of so many channels."""
    former = cfg.MODEL.MASK_FORMER
    switches = {key.lower(): value for key, value in former.CROSS_ATTENTION.items() if key != "NAME" and value is not None}
    if former.CROSS_ATTENTION.NAME in NHEADS_ATTENTIONS:
        switches.setdefault("heads", former.NHEADS)

    def cross_attention() -> CrossAttention:
        return build_attention(former.CROSS_ATTENTION.NAME, width=former.HIDDEN_DIM, **switches)

    return MaskDecoder(
        attention=cross_attention,
        width=former.HIDDEN_DIM,
        classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        queries=former.NUM_OBJECT_QUERIES,
        layers=former.DEC_LAYERS - 1,
        heads=former.NHEADS,
        feedforward=former.DIM_FEEDFORWARD,
        pre_norm=former.PRE_NORM,
        pyramid_channels=pyramid_channels,
        mask_source=former.MASK_SOURCE,
        mask_rule=former.MASK_RULE,
    )
