"""COCO's average precision of instance masks, from first principles.

Source: the COCO detection challenge; github.com/cocodataset/cocoapi, `COCOeval`, of whose rules this keeps every one for masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from emca_bench.data.base import Segment

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""Least intersection over union of a match; AP is the mean over them."""

RECALLS = np.linspace(0.0, 1.0, 101)
"""Recalls at which precision is read."""

MOST = 100
"""Predictions per image and class that are scored, best first."""

AREAS = {"all": (0, 1e5**2), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e5**2)}
"""Least and greatest pixels of a truth that is scored, both included."""

Area = Literal["all", "small", "medium", "large"]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Outcome:
    """One image and class: scores [N]; matched and ignored [areas, thresholds, N]; number of truths to find [areas]."""

    scores: Floats
    matched: Bools
    ignored: Bools
    wanted: npt.NDArray[np.int64]


class InstanceScore:
    """Matches predictions with truth image by image; equal scores keep the order in which they were added.

    Args:
        classes: number of classes, stuff included; it has no truth and no part in the means.
    """

    def __init__(self, classes: int) -> None:
        self._outcomes: list[list[_Outcome]] = [[] for _ in range(classes)]

    def add(
        self,
        truth_GHW: Bools,
        truth_categories_G: npt.ArrayLike,
        masks_NHW: Bools,
        categories_N: npt.ArrayLike,
        scores_N: npt.ArrayLike,
        *,
        iscrowd_G: npt.ArrayLike | None = None,
        areas_G: npt.ArrayLike | None = None,
    ) -> None:
        """Score one image.

        Args:
            truth_GHW, masks_NHW: bool masks of truth and predictions; they may overlap.
            truth_categories_G, categories_N: class indices.
            scores_N: of the predictions, higher is surer.
            iscrowd_G: truths that are crowds: not asked for, and what lies inside of one is not scored; None for no crowd.
            areas_G: pixels of the truths for the area ranges, where an annotation file states them; None to count them.

        Raises:
            ValueError: shapes that do not fit, or a class out of range.
        """
        truth, masks = np.asarray(truth_GHW, dtype=bool), np.asarray(masks_NHW, dtype=bool)
        truth_class, class_ = np.asarray(truth_categories_G, dtype=np.int64), np.asarray(categories_N, dtype=np.int64)
        scores = np.asarray(scores_N, dtype=np.float64)
        crowd = np.zeros(len(truth), dtype=bool) if iscrowd_G is None else np.asarray(iscrowd_G, dtype=bool)
        areas = truth.sum((1, 2)) if areas_G is None else np.asarray(areas_G, dtype=np.float64)
        self._check(truth, masks, [truth_class, crowd, areas], [class_, scores])
        own = masks.sum((1, 2))
        for category in np.union1d(truth_class, class_):
            rows = np.flatnonzero(class_ == category)
            rows = rows[np.argsort(-scores[rows], kind="stable")][:MOST]
            columns = np.flatnonzero(truth_class == category)
            iou = _iou(masks, rows, own, truth, columns, crowd)
            self._outcomes[category].append(_outcome(scores[rows], own[rows], iou, crowd[columns], areas[columns]))

    def _check(self, truth: Bools, masks: Bools, of_truth: Sequence[np.ndarray], of_masks: Sequence[np.ndarray]) -> None:
        for what, found, others in (("truth", truth, of_truth), ("predictions", masks, of_masks)):
            if found.ndim != 3 or any(other.shape != found.shape[:1] for other in others):
                shapes = ", ".join(str(list(other.shape)) for other in others)
                raise ValueError(f"{what}: masks have shape {list(found.shape)}, what belongs to them {shapes}; expected [N, H, W] and [N]")
            if len(found) and not 0 <= others[0].min() <= others[0].max() < len(self._outcomes):
                raise ValueError(f"{what}: class {others[0].max()} where 0..{len(self._outcomes) - 1} are known")
        if len(truth) and len(masks) and truth.shape[1:] != masks.shape[1:]:
            raise ValueError(f"predictions are {list(masks.shape[1:])}, their truth {list(truth.shape[1:])}")

    def class_ap(self, *, iou: float | None = None, area: Area = "all") -> Floats:
        """Average precision per class in 0..1; NaN for a class without truth.

        Args:
            iou: one of THRESHOLDS; None for the mean over them.
            area: range of AREAS.

        Raises:
            ValueError: another threshold.
        """
        kept = np.isclose(THRESHOLDS, iou) if iou is not None else np.ones(len(THRESHOLDS), dtype=bool)
        if not kept.any():
            raise ValueError(f"IoU threshold {iou}; expected one of {', '.join(f'{value:.2f}' for value in THRESHOLDS)}")
        return np.array([_precision(outcomes, list(AREAS).index(area))[kept].mean() for outcomes in self._outcomes])

    def ap(self, *, iou: float | None = None, area: Area = "all") -> float:
        """Mean of `class_ap` over the classes with truth, in 0..1: COCO's AP, AP50 at `iou=0.5`; NaN where there is no truth."""
        found = self.class_ap(iou=iou, area=area)
        return float(np.nanmean(found)) if not np.isnan(found).all() else float("nan")


def thing_masks(panoptic_HW: npt.NDArray[np.integer], segments: Sequence[Segment]) -> tuple[Bools, npt.NDArray[np.int64], Bools]:
    """The things of a panoptic truth as `InstanceScore.add` takes them: masks [G, H, W], class indices [G], iscrowd [G]."""
    things = [segment for segment in segments if segment.thing]
    ids = np.array([segment.id for segment in things], dtype=np.int64)
    categories = np.array([segment.category for segment in things], dtype=np.int64)
    return panoptic_HW[None] == ids[:, None, None], categories, np.array([segment.iscrowd for segment in things], dtype=bool)


def _iou(masks: Bools, rows: np.ndarray, own: np.ndarray, truth: Bools, columns: np.ndarray, crowd: Bools) -> Floats:
    """Intersection over union [N, G]; over the prediction alone where the truth is a crowd."""
    iou = np.zeros((len(rows), len(columns)))
    for index, column in enumerate(columns):
        inside = truth[column]
        ys, xs = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
        if not len(ys) or not len(rows):
            continue
        box = slice(ys[0], ys[-1] + 1), slice(xs[0], xs[-1] + 1)
        both = (masks[rows, *box] & inside[box]).sum((1, 2))
        whole = own[rows] if crowd[column] else own[rows] + inside.sum() - both
        iou[:, index] = np.divide(both, whole, out=np.zeros(len(rows)), where=both > 0)
    return iou


def _outcome(scores: Floats, own: np.ndarray, iou: Floats, crowd: Bools, areas: np.ndarray) -> _Outcome:
    """Greedy matching, best score first, in all area ranges and at all thresholds at once."""
    ranges = np.array(list(AREAS.values()))
    outside = crowd | (areas < ranges[:, :1]) | (areas > ranges[:, 1:])
    shape = len(ranges), len(THRESHOLDS), len(scores)
    matched, ignored = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    taken = np.zeros((*shape[:2], len(areas)), dtype=bool)
    for index in range(len(scores) if len(areas) else 0):
        fits = (iou[index] >= THRESHOLDS[:, None]) & (~taken | crowd)
        # a truth that is asked for comes before one that is not, however well it fits; of equals the last
        asked = fits & ~outside[:, None]
        rank = np.where(np.where(asked.any(-1, keepdims=True), asked, fits), iou[index], -1.0)
        best = len(areas) - 1 - rank[..., ::-1].argmax(-1)
        found = np.take_along_axis(fits, best[..., None], -1)[..., 0]
        matched[..., index] = found
        ignored[..., index] = found & np.take_along_axis(outside, best, 1)
        np.put_along_axis(taken, best[..., None], np.take_along_axis(taken, best[..., None], -1) | found[..., None], -1)
    size = (own < ranges[:, :1]) | (own > ranges[:, 1:])
    return _Outcome(scores, matched, ignored | (~matched & size[:, None]), (~outside).sum(1))


def _precision(outcomes: Sequence[_Outcome], area: int) -> Floats:
    """Mean over RECALLS of the interpolated precision, per threshold; NaN without truth."""
    wanted = sum(int(outcome.wanted[area]) for outcome in outcomes)
    if not wanted:
        return np.full(len(THRESHOLDS), np.nan)
    order = np.argsort(-np.concatenate([outcome.scores for outcome in outcomes]), kind="stable")
    matched, ignored = (
        np.concatenate([getattr(outcome, name)[area] for outcome in outcomes], axis=1)[:, order] for name in ("matched", "ignored")
    )
    right, wrong = (np.cumsum(found & ~ignored, axis=1, dtype=np.float64) for found in (matched, ~matched))
    recall, precision = right / wanted, right / (right + wrong + np.spacing(1.0))
    # precision at a recall is the best at that recall or beyond
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    best = np.concatenate([best, np.zeros((len(best), 1))], axis=1)
    return np.array([row[np.searchsorted(reached, RECALLS)].mean() for row, reached in zip(best, recall, strict=True)])
