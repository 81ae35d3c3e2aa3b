"""Pixel decoders, each registered under its name."""

from emca_bench.models.pixel_decoders import fpn, msdeform
from emca_bench.models.pixel_decoders.base import PIXEL_DECODERS, PixelDecoder, PixelFeatures

__all__ = ["PIXEL_DECODERS", "PixelDecoder", "PixelFeatures", "fpn", "msdeform"]
