"""Panoptic quality from first principles, with the rules of the COCO panoptic API.

Source: Kirillov et al., "Panoptic Segmentation", CVPR 2019, section 4; github.com/cocodataset/panopticapi for void and crowds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from emca_bench.data.base import VOID, Segment

MATCH = 0.5
"""A pair matches above this intersection over union; no segment can then match twice."""

Group = Literal["all", "things", "stuff"]


class PredictedSegment(Protocol):
    """What is read of a predicted segment: its id in the map and its class index."""

    @property
    def id(self) -> int:
        """Value of its pixels."""

    @property
    def category(self) -> int:
        """Class index."""


class PanopticScore:
    """Counts matches over the images of a data set.

    Args:
        things: per class, whether it is countable.

    Attributes:
        iou, tp, fp, fn: per class, the sum of the intersections over union of the matches, the matches, the predictions and the truths
            without one.
    """

    def __init__(self, things: Sequence[bool]) -> None:
        self.things = np.array(things, dtype=bool)
        self.iou = np.zeros(len(self.things))
        self.tp, self.fp, self.fn = (np.zeros(len(self.things), dtype=np.int64) for _ in range(3))

    def add(
        self,
        truth_HW: npt.NDArray[np.integer],
        truth: Sequence[Segment],
        prediction_HW: npt.NDArray[np.integer],
        prediction: Sequence[PredictedSegment],
    ) -> None:
        """Score one image.

        Args:
            truth_HW, prediction_HW: segment ids, 0 for none; where the truth has none nothing is scored.
            truth, prediction: one entry per id of its map.

        Raises:
            ValueError: maps of different sizes, an id without an entry, an entry without pixels, or a class out of range.
        """
        if truth_HW.shape != prediction_HW.shape:
            raise ValueError(f"prediction has shape {list(prediction_HW.shape)}, its truth {list(truth_HW.shape)}")
        truth_class, truth_index = self._indexed("truth", truth_HW, [(entry.id, entry.category) for entry in truth])
        class_, index = self._indexed("prediction", prediction_HW, [(entry.id, entry.category) for entry in prediction])
        crowd = np.array([False, *(entry.iscrowd for entry in truth)])
        shape = len(truth_class), len(class_)
        overlap = np.bincount((truth_index * shape[1] + index).ravel(), minlength=shape[0] * shape[1]).reshape(shape)
        # row 0 is void: what lies there is no part of a prediction
        union = overlap.sum(1)[:, None] + overlap.sum(0)[None] - overlap - overlap[0]
        iou = np.divide(overlap, union, out=np.zeros(shape), where=union > 0)
        comparable = (truth_class[:, None] == class_[None]) & ~crowd[:, None]
        comparable[0], comparable[:, 0] = False, False
        matched = comparable & (iou > MATCH)
        rows, columns = np.nonzero(matched)
        np.add.at(self.iou, class_[columns], iou[rows, columns])
        np.add.at(self.tp, class_[columns], 1)
        missed = ~matched.any(1) & ~crowd
        np.add.at(self.fn, truth_class[1:][missed[1:]], 1)
        wrong = ~matched.any(0) & (2 * _unscored(overlap, truth_class, class_, crowd) <= overlap.sum(0))
        np.add.at(self.fp, class_[1:][wrong[1:]], 1)

    def _indexed(
        self, what: str, ids_HW: npt.NDArray[np.integer], entries: Sequence[tuple[int, int]]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Class per segment, with -1 for void in front, and the map with positions in that list instead of ids."""
        ids = np.array([VOID, *(entry for entry, _ in entries)], dtype=np.int64)
        classes = np.array([-1, *(category for _, category in entries)], dtype=np.int64)
        present, places = np.unique(ids_HW, return_inverse=True)
        order = np.argsort(ids, kind="stable")
        if (np.diff(ids[order]) == 0).any():
            raise ValueError(f"{what} lists a segment twice, or lists the id {VOID}: {ids[1:].tolist()}")
        unknown = np.setdiff1d(present, ids)
        if unknown.size:
            raise ValueError(f"{what} has pixels of segment {unknown[0]}, which is not listed")
        absent = np.setdiff1d(ids[1:], present)
        if absent.size:
            raise ValueError(f"{what} lists segment {absent[0]}, which has no pixel")
        if len(entries) and not 0 <= classes[1:].min() <= classes[1:].max() < len(self.things):
            raise ValueError(f"{what} has classes {classes[1:].min()}..{classes[1:].max()} where 0..{len(self.things) - 1} are known")
        return classes, order[np.searchsorted(ids, present, sorter=order)][places.reshape(ids_HW.shape)]

    def class_pq(self) -> npt.NDArray[np.float64]:
        """PQ per class in 0..1, the product of SQ and RQ; NaN for a class that neither truth nor prediction has."""
        return self._over_counts(self.iou)

    def class_sq(self) -> npt.NDArray[np.float64]:
        """Mean intersection over union of the matches per class in 0..1, 0 without a match; NaN as in `class_pq`."""
        mean = np.divide(self.iou, self.tp, out=np.zeros_like(self.iou), where=self.tp > 0)
        return np.where(self._counted(), mean, np.nan)

    def class_rq(self) -> npt.NDArray[np.float64]:
        """F1 of the matches per class in 0..1; NaN as in `class_pq`."""
        return self._over_counts(self.tp)

    def pq(self, group: Group = "all") -> float:
        """Mean of `class_pq` over the classes of a group that truth or prediction have, in 0..1; NaN where there are none."""
        return self._mean(self.class_pq(), group)

    def sq(self, group: Group = "all") -> float:
        """Mean of `class_sq`, as `pq`."""
        return self._mean(self.class_sq(), group)

    def rq(self, group: Group = "all") -> float:
        """Mean of `class_rq`, as `pq`."""
        return self._mean(self.class_rq(), group)

    def _counted(self) -> npt.NDArray[np.bool_]:
        return self.tp + self.fp + self.fn > 0

    def _over_counts(self, values: npt.NDArray[np.float64] | npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        weight = self.tp + 0.5 * self.fp + 0.5 * self.fn
        return np.divide(values, weight, out=np.full(len(weight), np.nan), where=weight > 0)

    def _mean(self, values: npt.NDArray[np.float64], group: Group) -> float:
        members = {"all": np.ones_like(self.things), "things": self.things, "stuff": ~self.things}[group] & self._counted()
        return float(values[members].mean()) if members.any() else float("nan")


def _unscored(
    overlap: npt.NDArray[np.int64], truth_class: npt.NDArray[np.int64], class_: npt.NDArray[np.int64], crowd: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """Pixels of each prediction in void or in the crowd of its class; of several crowds of a class the last counts, as in panopticapi."""
    last = {int(truth_class[row]): row for row in np.flatnonzero(crowd)}
    rows = np.array([last.get(int(category), 0) for category in class_])
    inside = overlap[rows, np.arange(len(class_))]
    return overlap[0] + np.where(rows > 0, inside, 0)
