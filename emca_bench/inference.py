"""From queries and masks to results a user can draw: semantic, panoptic and instance, from the same predictions.

Masks are resized to the padded input, its padding is cropped, and what is left is resized to the wanted size, as Mask2Former does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from emca_bench.models.predictions import MASK_STRIDE, Predictions


@dataclass(frozen=True)
class PanopticSegment:
    """One segment of a panoptic map: its id there, its class index, whether that is a thing, and the class score in 0..1."""

    id: int
    category: int
    thing: bool
    score: float


@dataclass(frozen=True, eq=False)
class Panoptic:
    """Panoptic result of one image: int32 [H, W] segment ids, 0 for none, and one entry per id."""

    ids: Tensor
    segments: tuple[PanopticSegment, ...]


@dataclass(frozen=True, eq=False)
class Instances:
    """Instance result of one image, best first: scores [N] in 0..1, class indices int64 [N], masks bool [N, H, W]."""

    scores: Tensor
    categories: Tensor
    masks: Tensor


@torch.no_grad()
def semantic_scores(predictions: Predictions, size: tuple[int, int], *, resize_masks: bool = False) -> Tensor:
    """Score [B, classes, H, W] of each class at each pixel: the sum over queries of class probability times mask probability.

    Source: MaskFormer, section 3.4.

    Args:
        predictions: of the model.
        size: (H, W) of the result.
        resize_masks: take mask logits to the size of the result, as the original does in models that are panoptic or instance models
            too; by default the class scores are.
    """
    probability_BQK = predictions.class_logits.softmax(-1)[..., :-1]
    logits_BQHW = _resized(predictions.mask_logits, predictions.image_size)
    if resize_masks and tuple(logits_BQHW.shape[-2:]) != tuple(size):
        logits_BQHW = F.interpolate(logits_BQHW, size=size, mode="bilinear", align_corners=False)
    masks_BQHW = logits_BQHW.sigmoid()
    scores_BKHW = torch.einsum("bqk,bqhw->bkhw", probability_BQK, masks_BQHW)
    if tuple(scores_BKHW.shape[-2:]) != tuple(size):
        scores_BKHW = F.interpolate(scores_BKHW, size=size, mode="bilinear", align_corners=False)
    return scores_BKHW


@torch.no_grad()
def semantic(predictions: Predictions, size: tuple[int, int]) -> Tensor:
    """The best class of each pixel, int64 [B, H, W] at the given (H, W)."""
    return semantic_scores(predictions, size).argmax(1)


@torch.no_grad()
def panoptic(
    predictions: Predictions,
    size: tuple[int, int],
    *,
    things: Sequence[bool],
    object_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
) -> list[Panoptic]:
    """Segments that do not overlap, one result per image.

    A query takes part when its best class is an object with more than `object_threshold`. Each pixel goes to the query with the
    highest class score times mask probability, if that mask has at least 0.5 there. A query that wins less than
    `overlap_threshold` of its own mask is dropped. Stuff of one class becomes one segment.

    Source: Mask2Former's published panoptic inference.

    Args:
        predictions: of the model.
        size: (H, W) of the result.
        things: per class, whether it is countable.
        object_threshold, overlap_threshold: in 0..1.
    """
    results = []
    for class_logits_QK, mask_logits_Qhw in zip(predictions.class_logits, predictions.mask_logits, strict=True):
        scores_Q, categories_Q = class_logits_QK.softmax(-1).max(-1)
        kept = (categories_Q != class_logits_QK.shape[-1] - 1) & (scores_Q > object_threshold)
        masks_NHW = _at_size(mask_logits_Qhw[kept], predictions.image_size, size).sigmoid()
        results.append(_panoptic_of_image(scores_Q[kept], categories_Q[kept], masks_NHW, size, things, overlap_threshold))
    return results


@torch.no_grad()
def instances(predictions: Predictions, size: tuple[int, int], *, things: Sequence[bool], most: int = 100) -> list[Instances]:
    """The best-scored pairs of query and class, one result per image; of stuff classes none.

    A mask is where its logit is positive; the score is the class probability times the mean mask probability inside.

    Source: Mask2Former's published instance inference.

    Args:
        predictions: of the model.
        size: (H, W) of the result.
        things: per class, whether it is countable.
        most: pairs per image, before stuff is dropped.
    """
    countable_K = torch.tensor(list(things), device=predictions.class_logits.device)
    results = []
    for class_logits_QK, mask_logits_Qhw in zip(predictions.class_logits, predictions.mask_logits, strict=True):
        probability_QK = class_logits_QK.softmax(-1)[:, :-1]
        scores_N, pairs_N = probability_QK.flatten().topk(min(most, probability_QK.numel()))
        queries_N, categories_N = pairs_N // probability_QK.shape[1], pairs_N % probability_QK.shape[1]
        kept = countable_K[categories_N]
        logits_NHW = _at_size(mask_logits_Qhw[queries_N[kept]], predictions.image_size, size)
        masks_NHW = logits_NHW > 0
        inside = (logits_NHW.sigmoid() * masks_NHW).flatten(1).sum(1) / masks_NHW.flatten(1).sum(1).clamp(min=1)
        scores_N, order = (scores_N[kept] * inside).sort(descending=True, stable=True)
        results.append(Instances(scores_N, categories_N[kept][order], masks_NHW[order]))
    return results


def _panoptic_of_image(
    scores_N: Tensor, categories_N: Tensor, masks_NHW: Tensor, size: tuple[int, int], things: Sequence[bool], overlap_threshold: float
) -> Panoptic:
    if not len(scores_N):
        return Panoptic(torch.zeros(size, dtype=torch.int32, device=scores_N.device), ())
    owner_HW = (scores_N[:, None, None] * masks_NHW).argmax(0)
    inside_HW = masks_NHW.gather(0, owner_HW[None])[0] >= 0.5
    count = len(scores_N)
    won = torch.bincount(owner_HW.flatten(), minlength=count)
    own = (masks_NHW >= 0.5).flatten(1).sum(1)
    visible = torch.bincount(owner_HW[inside_HW], minlength=count)
    survives = (own > 0) & (visible > 0) & (won >= overlap_threshold * own)
    # the only look at values on the host, for all queries at once
    found = zip(survives.tolist(), categories_N.tolist(), scores_N.tolist(), strict=True)
    ids: list[int] = []
    segments: list[PanopticSegment] = []
    stuff: dict[int, int] = {}
    for survived, category, score in found:
        known = stuff.get(category)
        if not survived or known is not None:
            ids.append(known if survived and known is not None else 0)
            continue
        segments.append(PanopticSegment(len(segments) + 1, category, bool(things[category]), score))
        ids.append(len(segments))
        if not things[category]:
            stuff[category] = len(segments)
    table_N = torch.tensor(ids, dtype=torch.int32, device=owner_HW.device)
    return Panoptic(table_N[owner_HW] * inside_HW, tuple(segments))


def _resized(mask_logits_BQhw: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Logits at the size of the unpadded input."""
    height, width = image_size
    padded = [MASK_STRIDE * int(side) for side in mask_logits_BQhw.shape[-2:]]
    return F.interpolate(mask_logits_BQhw, size=padded, mode="bilinear", align_corners=False)[..., :height, :width]


def _at_size(mask_logits_Nhw: Tensor, image_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Logits [N, H, W] at the wanted size; N may be 0, which `interpolate` refuses."""
    if not len(mask_logits_Nhw):
        return mask_logits_Nhw.new_zeros(0, *size)
    logits = _resized(mask_logits_Nhw[None], image_size)
    if tuple(logits.shape[-2:]) != tuple(size):
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    return logits[0]
