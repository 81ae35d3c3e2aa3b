"""Backbones, each registered under its name."""

from emca_bench.models.backbones import resnet, swin, timm
from emca_bench.models.backbones.base import BACKBONES, LEVELS, Backbone

__all__ = ["BACKBONES", "LEVELS", "Backbone", "resnet", "swin", "timm"]
