"""From queries and masks to results a user can draw: semantic, panoptic and instance, from the same predictions.

Masks are resized to the padded input, its padding is cropped, and what is left is resized to the wanted size, as Mask2Former does. Where
all masks at that size are more than CHUNK numbers, they are made and used up in parts: the result is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from emca_bench import onednn
from emca_bench.models.predictions import MASK_STRIDE, Predictions

CHUNK = 2**25
"""Most numbers of a tensor at full resolution that is not itself a result: 128 MiB in float32, 100 masks of 512x512 in one part."""

STRIP = 2**21
"""The same for strips of class scores on a CPU, whose cache should hold them."""


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
    if resize_masks and tuple(predictions.image_size) != tuple(size):
        return _scores_of_resized_masks(predictions, size)
    scores_BKHW = _joined(list(_score_strips(predictions)), dim=2)
    if tuple(scores_BKHW.shape[-2:]) != tuple(size):
        scores_BKHW = F.interpolate(scores_BKHW, size=size, mode="bilinear", align_corners=False)
    return scores_BKHW


@torch.no_grad()
def semantic(predictions: Predictions, size: tuple[int, int]) -> Tensor:
    """The best class of each pixel, int64 [B, H, W] at the given (H, W)."""
    if tuple(predictions.image_size) == tuple(size):
        return _joined([strip_BKhW.max(1).indices for strip_BKhW in _score_strips(predictions)], dim=1)
    scores_BKhw = semantic_scores(predictions, predictions.image_size)
    best = _Best()
    for part in _parts(scores_BKhw.shape[1], scores_BKhw.shape[0] * size[0] * size[1]):
        best.update(F.interpolate(scores_BKhw[:, part], size=size, mode="bilinear", align_corners=False), part.start, dim=1)
    return best.index


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
        masks = _Masks(mask_logits_Qhw[kept], predictions.image_size, size)
        results.append(_panoptic_of_image(scores_Q[kept], categories_Q[kept], masks, things, overlap_threshold))
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
        masks = _Masks(mask_logits_Qhw[queries_N[kept]], predictions.image_size, size)
        masks_NHW, inside_N = _instance_masks(masks)
        scores_N, order = (scores_N[kept] * inside_N).sort(descending=True, stable=True)
        results.append(Instances(scores_N, categories_N[kept][order], masks_NHW[order]))
    return results


@dataclass(frozen=True, eq=False)
class _Masks:
    """Mask logits [N, h, w] that are wanted at a size, as parts that respect CHUNK."""

    logits_Nhw: Tensor
    image_size: tuple[int, int]
    size: tuple[int, int]

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Which of the N, and a fresh tensor of their logits at the size."""
        for part in _parts(len(self.logits_Nhw), self.size[0] * self.size[1]):
            logits_nHW = _resized(self.logits_Nhw[None, part], self.image_size)
            if tuple(self.image_size) != tuple(self.size):
                logits_nHW = F.interpolate(logits_nHW, size=self.size, mode="bilinear", align_corners=False)
            yield part, logits_nHW[0]


def _instance_masks(masks: _Masks) -> tuple[Tensor, Tensor]:
    """Where logits are positive, bool [N, H, W], and the mean mask probability there [N]."""
    count = len(masks.logits_Nhw)
    masks_NHW = torch.zeros(count, *masks.size, dtype=torch.bool, device=masks.logits_Nhw.device)
    inside_N = masks.logits_Nhw.new_zeros(count)
    for part, logits_nHW in masks.parts():
        masks_nHW = torch.gt(logits_nHW, 0, out=masks_NHW[part])
        inside_N[part] = (logits_nHW.sigmoid_() * masks_nHW).flatten(1).sum(1) / masks_nHW.flatten(1).sum(1).clamp(min=1)
    return masks_NHW, inside_N


def _panoptic_of_image(scores_N: Tensor, categories_N: Tensor, masks: _Masks, things: Sequence[bool], overlap_threshold: float) -> Panoptic:
    count = len(scores_N)
    if not count:
        return Panoptic(torch.zeros(masks.size, dtype=torch.int32, device=scores_N.device), ())
    best, own = _Best(), []
    for part, logits_nHW in masks.parts():
        masks_nHW = logits_nHW.sigmoid_()
        own.append((masks_nHW >= 0.5).flatten(1).sum(1))
        best.update(masks_nHW.mul(scores_N[part, None, None]), part.start, beside=masks_nHW)
    owner_HW, inside_HW = best.index, best.beside >= 0.5
    own_N = torch.cat(own)
    won_N = torch.bincount(owner_HW.flatten(), minlength=count)
    visible_N = torch.bincount(owner_HW[inside_HW], minlength=count)
    survives_N = (own_N > 0) & (visible_N > 0) & (won_N >= overlap_threshold * own_N)
    # the only look at values on the host, for all queries at once
    found = zip(survives_N.tolist(), categories_N.tolist(), scores_N.tolist(), strict=True)
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


@dataclass
class _Best:
    """Maximum over parts of a dimension: the index of the first greatest value, and what lies beside it in another tensor."""

    value: Tensor | None = None
    index: Tensor = field(default_factory=lambda: torch.empty(0))
    beside: Tensor = field(default_factory=lambda: torch.empty(0))

    def update(self, values: Tensor, start: int, *, dim: int = 0, beside: Tensor | None = None) -> None:
        """Take a part that begins at an index in; `beside` has its shape."""
        index = values.argmax(dim, keepdim=True)
        value, other = (part.gather(dim, index).squeeze(dim) for part in (values, values if beside is None else beside))
        index = index.squeeze(dim) + start
        if self.value is None:
            self.value, self.index, self.beside = value, index, other
            return
        better = value > self.value
        self.value = torch.where(better, value, self.value)
        self.index, self.beside = torch.where(better, index, self.index), torch.where(better, other, self.beside)


def _joined(parts: list[Tensor], *, dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _parts(count: int, pixels: int, most: int | None = None) -> Iterator[slice]:
    """Slices of a dimension such that each has at most CHUNK numbers, or `most`, or one index."""
    step = max(1, (CHUNK if most is None else most) // max(1, pixels))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _score_strips(predictions: Predictions) -> Iterator[Tensor]:
    """Class scores [B, classes, h, W] at the size of the unpadded input, a strip of rows at a time.

    The numbers of a pixel lie together: masks are resized, summed into classes and compared without a change of layout.
    """
    logits_BQhw, (height, width) = predictions.mask_logits, predictions.image_size
    probability_BKQ = _at_least_float(predictions.class_logits).softmax(-1)[..., :-1].mT.contiguous()
    row = logits_BQhw.shape[0] * max(probability_BKQ.shape[1:]) * MASK_STRIDE * logits_BQhw.shape[3]
    most = min(STRIP, CHUNK) if logits_BQhw.device.type == "cpu" else CHUNK
    for rows in _parts(-(-height // MASK_STRIDE), MASK_STRIDE * row, most):
        # a row of context on either side: what a resize in one piece would see
        low, high = max(0, rows.start - 1), min(logits_BQhw.shape[2], rows.stop + 1)
        strip = _at_least_float(logits_BQhw[:, :, low:high]).contiguous(memory_format=torch.channels_last)
        strip = _resized(strip, (MASK_STRIDE * (high - low), width))
        strip = strip[:, :, MASK_STRIDE * (rows.start - low) : min(MASK_STRIDE * rows.stop, height) - MASK_STRIDE * low]
        yield _class_scores(strip.sigmoid().permute(0, 2, 3, 1), probability_BKQ).permute(0, 3, 1, 2)


def _class_scores(masks_BhWQ: Tensor, probability_BKQ: Tensor) -> Tensor:
    """Sum over queries, [B, h, W, classes]."""
    product = F.linear if onednn.refuses(masks_BhWQ) else onednn.linear
    return torch.stack([product(masks_hWQ, weight_KQ) for masks_hWQ, weight_KQ in zip(masks_BhWQ, probability_BKQ, strict=True)])


def _at_least_float(logits: Tensor) -> Tensor:
    """Halves have too few bits to tell classes apart."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _scores_of_resized_masks(predictions: Predictions, size: tuple[int, int]) -> Tensor:
    """Class scores [B, classes, H, W] from masks at the size of the result, summed over parts of the queries."""
    probability_BQK = _at_least_float(predictions.class_logits).softmax(-1)[..., :-1]
    scores_BKHW = probability_BQK.new_zeros(probability_BQK.shape[0], probability_BQK.shape[2], *size)
    for scores_KHW, probability_QK, logits_Qhw in zip(scores_BKHW, probability_BQK, predictions.mask_logits, strict=True):
        for part, logits_qHW in _Masks(_at_least_float(logits_Qhw), predictions.image_size, size).parts():
            scores_KHW += torch.einsum("qk,qhw->khw", probability_QK[part], logits_qHW.sigmoid_())
    return scores_BKHW


def _resized(mask_logits_BQhw: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Logits at the size of the unpadded input."""
    height, width = image_size
    padded = [MASK_STRIDE * int(side) for side in mask_logits_BQhw.shape[-2:]]
    return F.interpolate(mask_logits_BQhw, size=padded, mode="bilinear", align_corners=False)[..., :height, :width]
