"""Several processes train what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from emca_bench.models import build_model
from emca_bench.train.processes import with_joint_norms


@pytest.mark.parametrize("attention", ["emca", "none"])
def test_two_processes_equal_one_with_the_joint_batch(tmp_path: Path, runs_file: Path, attention: str):
    """Under torchrun with gloo: the same data, losses and gradients up to rounding, and the same weights after three steps.

    The loss on the choice of pixels is among what EMCA trains with; without cross-attention, there are parameters that nothing trains.

    Every mask is compared at the same points, since two processes draw others than one does.
    """
    setting = {"crop": [64, 64], "steps": 3, "batch": 4, "fixed_points": True, "learning_rate": 1e-4, "attention": attention}
    setting |= {"selection_weight": 1.0} if attention == "emca" else {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"])):
        (tmp_path / name).mkdir()
        call = [sys.executable, *launcher, str(runs_file), str(tmp_path / name), json.dumps(setting)]
        done = subprocess.run(call, timeout=300, check=False, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / name / "result.pt", weights_only=True) for name in ("one", "two"))
    torch.testing.assert_close(torch.tensor(one["losses"]), torch.tensor(two["losses"]), rtol=1e-5, atol=1e-5)
    for name, tensor in one["state"].items():
        torch.testing.assert_close(two["state"][name], tensor, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_joint_norms_keep_the_activations_that_are_part_of_them():
    """In evaluation a model is the same with them, timm's backbone too."""
    model = build_model("mask2former_lite0", num_classes=5, attention="emca", layers=1, queries=4, width=32).eval()
    image = 255 * torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        before = model(image)
        joint = with_joint_norms(model)
        assert sum(isinstance(module, torch.nn.SyncBatchNorm) for module in joint.modules()) > 40
        after = joint(image)
    torch.testing.assert_close(after.mask_logits, before.mask_logits)
    torch.testing.assert_close(after.class_logits, before.class_logits)
