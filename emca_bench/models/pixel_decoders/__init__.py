"""Pixel decoders, each registered under its name."""

from emca_bench.models.pixel_decoders import csm_fpn, fpn, msdeform
from emca_bench.models.pixel_decoders.base import PIXEL_DECODERS, PixelDecoder, PixelFeatures

__all__ = ["PIXEL_DECODERS", "PixelDecoder", "PixelFeatures", "csm_fpn", "fpn", "msdeform"]
