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
    scores_BQ, categories_BQ = _at_least_float(predictions.class_logits).softmax(-1).max(-1)
    kept_BQ = (categories_BQ != predictions.class_logits.shape[-1] - 1) & (scores_BQ > object_threshold)
    # two looks at values on the host, for all images at once: which queries take part, and what became of them
    kept = [
        torch.tensor([query for query, keep in enumerate(kept_Q) if keep], dtype=torch.int64, device=scores_BQ.device)
        for kept_Q in kept_BQ.tolist()
    ]
    owned = [
        _owners(logits_Qhw[queries_N][None], scores_Q[queries_N], predictions.image_size, size)
        for logits_Qhw, scores_Q, queries_N in zip(predictions.mask_logits, scores_BQ, kept, strict=True)
    ]
    survives = torch.cat([_survivors(counts_3N, overlap_threshold) for _, counts_3N in owned])
    found = torch.stack(
        [
            survives.to(scores_BQ.dtype),
            *(torch.cat([row[queries_N] for row, queries_N in zip(rows, kept, strict=True)]) for rows in (categories_BQ, scores_BQ)),
        ]
    ).T.tolist()
    results = []
    for owner_HW, counts_3N in owned:
        own, found = found[: counts_3N.shape[1]], found[counts_3N.shape[1] :]
        ids, segments = _segments([(bool(survived), int(category), score) for survived, category, score in own], things)
        table = torch.tensor([*ids, 0], dtype=torch.int32, device=owner_HW.device)
        results.append(Panoptic(table.index_select(0, owner_HW.flatten()).view(owner_HW.shape), segments))
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
    probability_BQK = _at_least_float(predictions.class_logits).softmax(-1)[..., :-1]
    classes = probability_BQK.shape[2]
    scores_BN, pairs_BN = probability_BQK.flatten(1).topk(min(most, probability_BQK[0].numel()))
    results = []
    # the only look at values on the host, for all images at once
    for logits_Qhw, scores_N, pairs_N, pairs in zip(predictions.mask_logits, scores_BN, pairs_BN, pairs_BN.tolist(), strict=True):
        kept = [index for index, pair in enumerate(pairs) if things[pair % classes]]
        # a query may be in several pairs, its mask is made once
        queries = sorted({pairs[index] // classes for index in kept})
        place = {query: index for index, query in enumerate(queries)}
        kept_N, mask_of_N, queries_M = (
            torch.tensor(chosen, dtype=torch.int64, device=scores_N.device)
            for chosen in (kept, [place[pairs[index] // classes] for index in kept], queries)
        )
        masks_NHW = torch.empty(len(kept), *size, dtype=torch.bool, device=scores_N.device)
        inside_M = _instance_masks(logits_Qhw[queries_M][None], predictions.image_size, size, out=masks_NHW)
        scores_N, order_N = (scores_N[kept_N] * inside_M[mask_of_N]).sort(descending=True, stable=True)
        for rows in _parts(size[0], len(kept) * size[1]):
            masks_NHW[:, rows] = masks_NHW[: len(queries), rows][mask_of_N[order_N]]
        results.append(Instances(scores_N, (pairs_N[kept_N] % classes)[order_N], masks_NHW))
    return results


def _instance_masks(logits_1Mhw: Tensor, image_size: tuple[int, int], size: tuple[int, int], *, out: Tensor) -> Tensor:
    """Writes where logits are positive to bool [at least M, H, W]; returns the mean mask probability there [M]."""
    sums_2M = _at_least_float(logits_1Mhw).new_zeros(2, logits_1Mhw.shape[1])
    for rows, logits_1MhW in _strips(logits_1Mhw, image_size, size):
        masks_MhW = logits_1MhW[0] > 0
        out[: len(masks_MhW), rows] = masks_MhW
        sums_2M += torch.stack([(logits_1MhW[0].sigmoid_() * masks_MhW).sum((1, 2)), masks_MhW.sum((1, 2))])
    return sums_2M[0] / sums_2M[1].clamp(min=1)


def _owners(logits_1Nhw: Tensor, scores_N: Tensor, image_size: tuple[int, int], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Which query each pixel belongs to, int32 [H, W], N where it is outside of that query's mask.

    Beside it pixels int64 [3, N]: of each mask, of those won, and of those won inside of the mask.
    """
    count = len(scores_N)
    owner_HW = torch.full(size, count, dtype=torch.int32, device=scores_N.device)
    counts_3N = torch.zeros(3, count, dtype=torch.int64, device=scores_N.device)
    for rows, logits_1NhW in _strips(logits_1Nhw, image_size, size):
        masks_NhW = logits_1NhW[0].sigmoid_()
        best_hW = (masks_NhW * scores_N[:, None, None]).max(0).indices
        inside_hW = masks_NhW.gather(0, best_hW[None])[0] >= 0.5
        counts_3N[0] += (masks_NhW >= 0.5).sum((1, 2))
        won = torch.stack([torch.ones_like(inside_hW), inside_hW]).flatten(1).long()
        counts_3N[1:].scatter_add_(1, best_hW.flatten().expand(2, -1), won)
        owner_HW[rows] = torch.where(inside_hW, best_hW, count).int()
    return owner_HW, counts_3N


def _survivors(counts_3N: Tensor, overlap_threshold: float) -> Tensor:
    own_N, won_N, visible_N = counts_3N
    return (own_N > 0) & (visible_N > 0) & (won_N >= overlap_threshold * own_N)


def _segments(found: Sequence[tuple[bool, int, float]], things: Sequence[bool]) -> tuple[list[int], tuple[PanopticSegment, ...]]:
    """Ids of queries that (survived, have a category, have a score), 0 for none, and the segments that they make."""
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
    return ids, tuple(segments)


@dataclass
class _Best:
    """The index of the first greatest value over parts of a dimension."""

    value: Tensor | None = None
    index: Tensor = field(default_factory=lambda: torch.empty(0))

    def update(self, values: Tensor, start: int, *, dim: int) -> None:
        """Take a part that begins at an index in."""
        value, index = values.max(dim)
        if self.value is None:
            self.value, self.index = value, index + start
            return
        better = value > self.value
        self.value, self.index = torch.where(better, value, self.value), torch.where(better, index + start, self.index)


def _joined(parts: list[Tensor], *, dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _parts(count: int, pixels: int, most: int | None = None) -> Iterator[slice]:
    """Slices of a dimension such that each has at most CHUNK numbers, or `most`, or one index."""
    step = max(1, (CHUNK if most is None else most) // max(1, pixels))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _strips(logits_BNhw: Tensor, image_size: tuple[int, int], size: tuple[int, int], *, beside: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """Which rows of the result, and a fresh tensor [B, N, rows, W] of logits there; nothing where N is 0.

    The numbers of a pixel lie together: masks are resized, summed into classes and compared without a change of layout.

    Args:
        logits_BNhw: [B, N, h, w] of the padded input.
        image_size: (H, W) of the unpadded input.
        size: (H, W) of the result.
        beside: numbers of a pixel that the caller makes of the N, where they may be more.
    """
    batch, queries, _, across = logits_BNhw.shape
    height, width = image_size
    most = min(STRIP, CHUNK) if logits_BNhw.device.type == "cpu" else CHUNK
    numbers = batch * max(queries, beside)
    if not queries:
        return
    if tuple(size) == tuple(image_size):
        for rows in _parts(-(-height // MASK_STRIDE), MASK_STRIDE**2 * numbers * across, most):
            yield slice(MASK_STRIDE * rows.start, min(MASK_STRIDE * rows.stop, height)), _rows(logits_BNhw, rows, image_size)
        return
    step = height / size[0]
    for rows in _parts(size[0], numbers * max(size[1], -int(-step // 1) * width), most):
        # centres of pixels on centres of pixels, as in a resize in one piece
        at = ((torch.arange(rows.start, rows.stop, device=logits_BNhw.device, dtype=torch.float64) + 0.5) * step - 0.5).clamp(min=0)
        first, last = (int(max(0.0, (row + 0.5) * step - 0.5)) for row in (rows.start, rows.stop - 1))
        read = slice(first // MASK_STRIDE, min(-(-height // MASK_STRIDE), (last + 1) // MASK_STRIDE + 1))
        source_BhwN = _rows(logits_BNhw, read, image_size).permute(0, 2, 3, 1)
        above = at.long()
        below = (above + 1).clamp(max=height - 1)
        upper, lower = (source_BhwN.index_select(1, row - MASK_STRIDE * read.start) for row in (above, below))
        mixed_BhwN = upper.lerp(lower, (at - above).to(upper.dtype)[:, None, None])
        yield rows, F.interpolate(mixed_BhwN.permute(0, 3, 1, 2), size=(len(at), size[1]), mode="bilinear", align_corners=False)


def _rows(logits_BNhw: Tensor, rows: slice, image_size: tuple[int, int]) -> Tensor:
    """Logits [B, N, rows, W] of the unpadded input where these rows of the stored ones lie, as a resize in one piece has them."""
    height, width = image_size
    # a row of context on either side
    low, high = max(0, rows.start - 1), min(logits_BNhw.shape[2], rows.stop + 1)
    strip = _at_least_float(logits_BNhw[:, :, low:high]).contiguous(memory_format=torch.channels_last)
    strip = _resized(strip, (MASK_STRIDE * (high - low), width))
    return strip[:, :, MASK_STRIDE * (rows.start - low) : min(MASK_STRIDE * rows.stop, height) - MASK_STRIDE * low]


def _score_strips(predictions: Predictions) -> Iterator[Tensor]:
    """Class scores [B, classes, h, W] at the size of the unpadded input, a strip of rows at a time."""
    probability_BKQ = _at_least_float(predictions.class_logits).softmax(-1)[..., :-1].mT.contiguous()
    size = predictions.image_size
    for _, strip in _strips(predictions.mask_logits, size, size, beside=probability_BKQ.shape[1]):
        yield _class_scores(strip.sigmoid().permute(0, 2, 3, 1), probability_BKQ).permute(0, 3, 1, 2)


def _class_scores(masks_BhWQ: Tensor, probability_BKQ: Tensor) -> Tensor:
    """Sum over queries, [B, h, W, classes]."""
    product = F.linear if onednn.refuses(masks_BhWQ) else onednn.linear
    return torch.stack([product(masks_hWQ, weight_KQ) for masks_hWQ, weight_KQ in zip(masks_BhWQ, probability_BKQ, strict=True)])


def _at_least_float(logits: Tensor) -> Tensor:
    """Halves have too few bits to tell classes apart."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _scores_of_resized_masks(predictions: Predictions, size: tuple[int, int]) -> Tensor:
    """Class scores [B, classes, H, W] from masks at the size of the result."""
    probability_BKQ = _at_least_float(predictions.class_logits).softmax(-1)[..., :-1].mT.contiguous()
    strips = _strips(predictions.mask_logits, predictions.image_size, size, beside=probability_BKQ.shape[1])
    scores = [_class_scores(strip.sigmoid().permute(0, 2, 3, 1), probability_BKQ).permute(0, 3, 1, 2) for _, strip in strips]
    return _joined(scores, dim=2)


def _resized(mask_logits_BQhw: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Logits at the size of the unpadded input."""
    height, width = image_size
    padded = [MASK_STRIDE * int(side) for side in mask_logits_BQhw.shape[-2:]]
    return F.interpolate(mask_logits_BQhw, size=padded, mode="bilinear", align_corners=False)[..., :height, :width]
