"""The complete model: backbone, pixel decoder, mask decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from emca_kernels.autocast import autocast_dtype
from torch import Tensor, nn

from emca_bench.models.backbones import Backbone
from emca_bench.models.mask_decoder import MaskDecoder
from emca_bench.models.mask_use import MaskUse
from emca_bench.models.pixel_decoders import PixelDecoder
from emca_bench.models.predictions import Predictions

SIZE_DIVISIBILITY = 32


class MaskFormerHead(nn.Module):
    """Pixel decoder and mask decoder, under the original's names; as there, autocast leaves the pixel decoder in float32."""

    def __init__(self, pixel_decoder: PixelDecoder, predictor: MaskDecoder) -> None:
        super().__init__()
        self.pixel_decoder = pixel_decoder
        self.predictor = predictor

    def forward(self, maps: dict[str, Tensor], *, image_size: tuple[int, int]) -> Predictions:
        """Backbone maps to predictions."""
        first = next(iter(maps.values()))
        if autocast_dtype(first) is None:
            mask_features, pyramid = self.pixel_decoder(maps)
        else:
            with torch.autocast(first.device.type, enabled=False):
                mask_features, pyramid = self.pixel_decoder({level: features.float() for level, features in maps.items()})
        return self.predictor(mask_features, pyramid, image_size=image_size)


class Mask2Former(nn.Module):
    """Images to a class and a mask per query.

    Source: Cheng et al., Masked-attention Mask Transformer for Universal Image Segmentation, 2022.

    Attributes:
        mask_use: takes masks away from the cross-attentions; None where they always have them.
    """

    def __init__(self, *, backbone: Backbone, pixel_decoder: PixelDecoder, predictor: MaskDecoder) -> None:
        super().__init__()
        self.mask_use: MaskUse | None = None
        self.backbone = backbone
        self.sem_seg_head = MaskFormerHead(pixel_decoder, predictor)
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer("pixel_mean", torch.tensor(backbone.pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(backbone.pixel_std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Predictions:
        """Predict.

        Args:
            images: [B, 3, H, W] RGB in 0..255, floating point, any size from 32 up; padded to multiples of 32 after normalisation.

        Raises:
            ValueError: another rank or number of channels.
        """
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images has shape {list(images.shape)} and {images.dtype}, expected floating point [B, 3, H, W] in 0..255")
        return self.sem_seg_head(self.backbone_maps(images), image_size=(int(images.shape[-2]), int(images.shape[-1])))

    def backbone_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Maps of the normalised and padded images, by level."""
        height, width = int(images.shape[-2]), int(images.shape[-1])
        # statistics may be more precise than the weights
        normalised = ((images - self.pixel_mean) / self.pixel_std).to(self.sem_seg_head.predictor.query_feat.weight.dtype)
        return self.backbone(F.pad(normalised, (0, -width % SIZE_DIVISIBILITY, 0, -height % SIZE_DIVISIBILITY)))
