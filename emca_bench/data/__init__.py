"""Datasets, generated and real, and training augmentation. What needs torch is in `emca_bench.data.targets`."""

from emca_bench.data.augment import Augmentation
from emca_bench.data.base import DATASETS, IGNORE, VOID, ClassInfo, Dataset, Sample, Segment, open_dataset
from emca_bench.data.camvid import camvid
from emca_bench.data.folder import SemanticFolder, find_dataset_folder
from emca_bench.data.scenes import Scenes

__all__ = [
    "DATASETS",
    "IGNORE",
    "VOID",
    "Augmentation",
    "ClassInfo",
    "Dataset",
    "Sample",
    "Scenes",
    "Segment",
    "SemanticFolder",
    "camvid",
    "find_dataset_folder",
    "open_dataset",
]
