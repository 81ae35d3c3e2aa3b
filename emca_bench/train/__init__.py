"""Training of mask-classification models."""

from emca_bench.train.loop import Files, TrainingLog, train
from emca_bench.train.processes import Processes
from emca_bench.train.recipe import RECIPES, Recipe, make_recipe

__all__ = ["RECIPES", "Files", "Processes", "Recipe", "TrainingLog", "make_recipe", "train"]
