"""Datasets, generated and real, and training augmentation. What needs torch is in `emca_bench.data.targets`."""

from emca_bench.data.ade20k import ade20k, ade20k_panoptic
from emca_bench.data.augment import Augmentation
from emca_bench.data.base import DATASETS, IGNORE, VOID, ClassInfo, Dataset, Sample, Segment
from emca_bench.data.camvid import camvid
from emca_bench.data.cityscapes import cityscapes, cityscapes_panoptic
from emca_bench.data.coco_panoptic import CocoPanoptic, coco
from emca_bench.data.facade import facade
from emca_bench.data.folder import SemanticFolder, find_dataset_folder
from emca_bench.data.opening import open_dataset
from emca_bench.data.scenes import Scenes

__all__ = [
    "DATASETS",
    "IGNORE",
    "VOID",
    "Augmentation",
    "ClassInfo",
    "CocoPanoptic",
    "Dataset",
    "Sample",
    "Scenes",
    "Segment",
    "SemanticFolder",
    "ade20k",
    "ade20k_panoptic",
    "camvid",
    "cityscapes",
    "cityscapes_panoptic",
    "coco",
    "facade",
    "find_dataset_folder",
    "open_dataset",
]
