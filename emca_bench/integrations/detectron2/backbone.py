"""Swin as a detectron2 backbone, under Mask2Former's name. ResNet is detectron2's own `build_resnet_backbone`."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor

from emca_bench.integrations.detectron2.config import ONLY_SWIN, check_only
from emca_bench.models.backbones import LEVELS
from emca_bench.models.backbones.swin import SwinTransformer


@BACKBONE_REGISTRY.register()
class D2SwinTransformer(SwinTransformer, Backbone):
    """Swin from `MODEL.SWIN.*`, with the parameter names of Mask2Former's checkpoints.

    Raises:
        UsageError: a value of `MODEL.SWIN` that is not implemented.
    """

    def __init__(self, cfg: CfgNode, input_shape: ShapeSpec) -> None:
        check_only(cfg, ONLY_SWIN)
        swin = cfg.MODEL.SWIN
        super().__init__(
            embed_dim=swin.EMBED_DIM,
            depths=tuple(swin.DEPTHS),
            num_heads=tuple(swin.NUM_HEADS),
            window_size=swin.WINDOW_SIZE,
            drop_path_rate=swin.DROP_PATH_RATE,
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See `SwinTransformer.forward`."""
        return SwinTransformer.forward(self, images)

    def output_shape(self) -> dict[str, Any]:
        """Channels and stride of each map."""
        return {level: ShapeSpec(channels=self.channels[level], stride=4 * 2**index) for index, level in enumerate(LEVELS)}

    @property
    def size_divisibility(self) -> int:
        """Both sides of the input are padded to multiples of this."""
        return 32
