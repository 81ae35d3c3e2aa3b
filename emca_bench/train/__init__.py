"""Training of mask-classification models."""

from emca_bench.train.loop import TrainingLog, train
from emca_bench.train.recipe import Recipe

__all__ = ["Recipe", "TrainingLog", "train"]
