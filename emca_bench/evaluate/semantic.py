"""Mean intersection over union from a confusion matrix over all pixels of a data set."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from emca_bench.data.base import IGNORE


class SemanticScore:
    """Accumulates a confusion matrix, rows truth and columns prediction.

    Args:
        classes: number of classes; truth of 255 is not scored.
    """

    def __init__(self, classes: int) -> None:
        self.confusion: npt.NDArray[np.int64] = np.zeros((classes, classes), dtype=np.int64)

    def add(self, truth_HW: npt.NDArray[np.uint8], prediction_HW: npt.NDArray[np.integer]) -> None:
        """Score one image.

        Raises:
            ValueError: maps of different sizes, or a class out of range.
        """
        if truth_HW.shape != prediction_HW.shape:
            raise ValueError(f"prediction has shape {list(prediction_HW.shape)}, its truth {list(truth_HW.shape)}")
        classes = len(self.confusion)
        scored = truth_HW != IGNORE
        truth, prediction = truth_HW[scored].astype(np.int64), prediction_HW[scored].astype(np.int64)
        if truth.size and (truth.max() >= classes or prediction.max() >= classes or prediction.min() < 0):
            raise ValueError(f"class {max(truth.max(), prediction.max())} where 0..{classes - 1} are known")
        self.confusion += np.bincount(truth * classes + prediction, minlength=classes * classes).reshape(classes, classes)

    def class_iou(self) -> npt.NDArray[np.float64]:
        """Intersection over union per class in 0..1; NaN for a class that neither truth nor prediction has."""
        inside = np.diag(self.confusion).astype(np.float64)
        union = self.confusion.sum(0) + self.confusion.sum(1) - inside
        return np.divide(inside, union, out=np.full_like(inside, np.nan), where=union > 0)

    def miou(self) -> float:
        """Mean over the classes that the truth has, in 0..1, as detectron2's evaluator takes it."""
        present = self.confusion.sum(1) > 0
        return float(self.class_iou()[present].mean()) if present.any() else float("nan")

    def pixel_accuracy(self) -> float:
        """Share of the scored pixels that are right, in 0..1."""
        total = self.confusion.sum()
        return float(np.trace(self.confusion) / total) if total else float("nan")

    def always(self, predicted: int) -> SemanticScore:
        """The score of predicting one class everywhere on the same pixels."""
        constant = SemanticScore(len(self.confusion))
        constant.confusion[:, predicted] = self.confusion.sum(1)
        return constant
