from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emca_bench.integrations.detectron2.compat import provide_in1d, read_labels


@pytest.mark.parametrize("dtype", [None, int, np.uint8])
def test_labels_are_read_writable_in_the_wanted_dtype(dtype: object, tmp_path: Path, rng: np.random.Generator):
    labels = rng.integers(0, 256, (5, 7), dtype=np.uint8)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    found = read_labels(str(tmp_path / "labels.png"), dtype=dtype)
    assert np.array_equal(found, labels)
    assert found.dtype == (dtype or np.uint8)
    found[found == 0] = 1


def test_in1d_is_put_back_only_where_it_is_missing(monkeypatch: pytest.MonkeyPatch):
    own = object()
    monkeypatch.setattr(np, "in1d", own, raising=False)
    provide_in1d()
    assert vars(np)["in1d"] is own
    monkeypatch.delattr(np, "in1d")
    provide_in1d()
    try:
        assert vars(np)["in1d"]([1, 2, 3], [2]).tolist() == [False, True, False]
    finally:
        monkeypatch.setattr(np, "in1d", own, raising=False)


def test_importing_the_integration_first_makes_torchvision_importable():
    code = "import emca_bench.integrations.detectron2, torchvision; from detectron2.structures import Boxes; print('ok')"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True).stdout == "ok\n"
