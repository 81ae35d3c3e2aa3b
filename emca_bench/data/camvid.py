"""CamVid-11: road scenes with the classes and splits of the SegNet tutorial."""

from __future__ import annotations

import os

from emca_bench.data.base import DATASETS, ClassInfo
from emca_bench.data.folder import SemanticFolder, find_dataset_folder

CLASSES = (
    ClassInfo("sky", False, (128, 128, 128)),
    ClassInfo("building", False, (128, 0, 0)),
    ClassInfo("pole", True, (192, 192, 128)),
    ClassInfo("road", False, (128, 64, 128)),
    ClassInfo("pavement", False, (60, 40, 222)),
    ClassInfo("tree", False, (128, 128, 0)),
    ClassInfo("sign_symbol", True, (192, 128, 128)),
    ClassInfo("fence", False, (64, 64, 128)),
    ClassInfo("car", True, (64, 0, 128)),
    ClassInfo("pedestrian", True, (64, 64, 0)),
    ClassInfo("bicyclist", True, (0, 128, 192)),
)


@DATASETS.register("camvid")
def camvid(split: str, *, root: str | os.PathLike[str] | None = None) -> SemanticFolder:
    """CamVid-11, semantic labels only, from `<root>/camvid/{images,annotations}/{train,val,test}`.

    Args:
        split: "train", "val" or "test".
        root: the folder that holds "camvid"; None for the places of the environment.

    Raises:
        UsageError: see SemanticFolder and find_dataset_folder.
    """
    return SemanticFolder("camvid", split, CLASSES, folder=find_dataset_folder("camvid", root))
