"""What versions of NumPy took away from detectron2's evaluators and cityscapesscripts; each fix acts only where it is needed.

torchvision beside a CPU-only torch has its own fix, which every backbone shares: `emca_bench.models.backbones.torchvision_shim`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from detectron2.utils.file_io import PathManager
from PIL import Image


def read_labels(file_name: str, copy: bool = False, dtype: npt.DTypeLike | None = None) -> npt.NDArray[Any]:
    """A label image as a writable array [H, W]: `sem_seg_loading_fn` of detectron2's SemSegEvaluator.

    Its default asks NumPy never to copy, which NumPy 2 refuses.
    """
    with PathManager.open(file_name, "rb") as file, Image.open(file) as image:
        return np.array(image, dtype=dtype)


def provide_in1d() -> None:
    """`numpy.in1d`, gone in NumPy 2.4, for cityscapesscripts; does nothing where it is there."""
    if not hasattr(np, "in1d"):
        vars(np)["in1d"] = np.isin
