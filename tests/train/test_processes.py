"""Several processes train what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch


def test_two_processes_equal_one_with_the_joint_batch(tmp_path: Path, runs_file: Path):
    """Under torchrun with gloo: the same data, losses and gradients up to rounding, and the same weights after three steps.

    The loss on the choice of pixels is among what they train with.

    Every mask is compared at the same points, since two processes draw others than one does.
    """
    setting = {"crop": [64, 64], "steps": 3, "batch": 4, "fixed_points": True, "learning_rate": 1e-4, "selection_weight": 1.0}
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
