"""From queries and masks to results a user can draw."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from emca_bench.models.predictions import Predictions

MASK_STRIDE = 4


@torch.no_grad()
def semantic_scores(predictions: Predictions, size: tuple[int, int]) -> Tensor:
    """Score [B, classes, H, W] of each class at each pixel: the sum over queries of class probability times mask probability.

    Source: MaskFormer, section 3.4; masks are resized to the input, padding cropped, then the class scores resized.

    Args:
        predictions: of the model.
        size: (H, W) of the result.
    """
    probability_BQK = predictions.class_logits.softmax(-1)[..., :-1]
    masks = _input_masks(predictions).sigmoid()
    scores = torch.einsum("bqk,bqhw->bkhw", probability_BQK, masks)
    if tuple(scores.shape[-2:]) != tuple(size):
        scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
    return scores


@torch.no_grad()
def semantic(predictions: Predictions, size: tuple[int, int]) -> Tensor:
    """The best class of each pixel, int64 [B, H, W] at the given (H, W)."""
    return semantic_scores(predictions, size).argmax(1)


def _input_masks(predictions: Predictions) -> Tensor:
    height, width = predictions.image_size
    rows, columns = (MASK_STRIDE * int(size) for size in predictions.mask_logits.shape[-2:])
    masks = F.interpolate(predictions.mask_logits, size=(rows, columns), mode="bilinear", align_corners=False)
    return masks[..., :height, :width]
