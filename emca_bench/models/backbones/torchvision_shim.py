"""PyPI's torchvision beside a CPU-only torch: its compiled part cannot load, its Python part can."""

from __future__ import annotations

import importlib.util
import sys

import torch

_libraries: list[torch.library.Library] = []


def make_torchvision_importable() -> None:
    """Define the two operator schemas that torchvision's import registers fakes for, where its own library cannot define them.

    The operators themselves stay unavailable; nothing here calls them. Does nothing where torchvision is absent, already imported,
    or complete.
    """
    if "torchvision" in sys.modules or _libraries or importlib.util.find_spec("torchvision") is None:
        return
    if torch.version.cuda is not None:
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
