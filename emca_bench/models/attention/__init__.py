"""Cross-attentions of the mask decoder, each registered under its name."""

from emca_bench.models.attention import mask_mean, masked, none, presets
from emca_bench.models.attention.base import ATTENTIONS, CrossAttention, build_attention

__all__ = ["ATTENTIONS", "CrossAttention", "build_attention", "mask_mean", "masked", "none", "presets"]
