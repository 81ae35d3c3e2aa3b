"""Datasets by name."""

from __future__ import annotations

import inspect
from typing import Any

from emca_bench.data.base import DATASETS, Dataset
from emca_bench.data.coco_panoptic import own_dataset
from emca_bench.errors import UsageError, did_you_mean, listing


def open_dataset(name: str, split: str, **options: Any) -> Dataset:
    """Open one split of a dataset.

    Args:
        name: a name in DATASETS, or of a folder of one's own with COCO-panoptic files: see `own_dataset`.
        split: a split of that dataset, usually "train", "val" or "test".
        options: of that dataset, for example `root` or `size`.

    Raises:
        UsageError: an unknown name, split or option, or data that cannot be used.
    """
    own = None if name in DATASETS else own_dataset(name)
    factory = DATASETS[name] if own is None else own
    known = [p.name for p in inspect.signature(factory).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise UsageError(f"unknown option {option!r} of dataset {name!r}{did_you_mean(option, known)}; known: {listing(known)}")
    return factory(split, **options)
