"""Building facades: street photos with windows, balconies and shops as instances."""

from __future__ import annotations

import os

from emca_bench.data.base import DATASETS, ClassInfo, check_split
from emca_bench.data.coco_panoptic import SPLITS, CocoPanoptic, split_folder
from emca_bench.data.folder import find_dataset_folder

CLASSES = (
    ClassInfo("window", True, (31, 119, 220)),
    ClassInfo("balcony-fence", True, (240, 140, 30)),
    ClassInfo("car", True, (200, 30, 60)),
    ClassInfo("shop", True, (150, 70, 190)),
    ClassInfo("traffic-infrastructure", True, (250, 210, 40)),
    ClassInfo("facade", False, (200, 180, 150)),
    ClassInfo("street", False, (110, 110, 120)),
    ClassInfo("vegetation", False, (90, 160, 70)),
    ClassInfo("fence", False, (150, 110, 80)),
    ClassInfo("non-building-infrastructure", False, (120, 190, 200)),
)


@DATASETS.register("facade")
def facade(split: str, *, root: str | os.PathLike[str] | None = None) -> CocoPanoptic:
    """Five things and five stuff of house fronts, from `<root>/facade/images/<split>`, `panoptic_<split>.json` and `panoptic_<split>/`.

    Source: github.com/a-hwang/building-facade-segmentation (CC BY 4.0), as COCO-panoptic files.

    Args:
        split: "train", "val" or "test".
        root: the folder that holds "facade"; None for the places of the environment.

    Raises:
        UsageError: see CocoPanoptic and find_dataset_folder.
    """
    check_split("facade", split, SPLITS)
    return split_folder(find_dataset_folder("facade", root), "facade", split, classes=CLASSES)
