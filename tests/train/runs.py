"""A small training for tests, also as a process of its own: `python runs.py FOLDER TASK NAME=VALUE...`, values in JSON."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from emca_bench.data import Sample, Scenes
from emca_bench.models import build_model
from emca_bench.train import Files, Processes, Recipe, TrainingLog, train

SMALL: dict[str, Any] = {"steps": 6, "batch": 2, "crop": (64, 64), "points": 32, "seed": 3}


def run(
    samples: Sequence[Sample],
    *,
    attention: str = "emca",
    files: Files | None = None,
    processes: Processes | None = None,
    workers: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    **changes: Any,
) -> tuple[dict[str, torch.Tensor], TrainingLog]:
    """Weights and log of a training of the tiny model."""
    torch.manual_seed(7)
    model = build_model("mask2former_tiny", num_classes=10, attention=attention, layers=2, queries=6, width=32)
    recipe = Recipe(**{**SMALL, **changes})
    log = train(
        model,
        samples,
        recipe,
        classes=10,
        task="panoptic",
        pretrained_backbone=False,
        label=f"{attention} seed={recipe.seed}",
        files=files,
        processes=processes,
        workers=workers,
        on_step=on_step,
    )
    return model.state_dict(), log


def same_points_for_every_mask() -> None:
    """Sampled points become a fixed list: what a process draws cannot depend on which images it has."""
    fixed = torch.rand(4096, 2, generator=torch.Generator().manual_seed(0))
    torch.rand = lambda *size, **options: fixed[: size[-2]].expand(*size).clone()  # type: ignore[assignment,misc]


def main() -> None:
    """Train and save weights and losses in a folder; `kill_at` ends the process as kill -9 does after that step."""
    folder, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
    kill_at, fixed_points = changes.pop("kill_at", 0), changes.pop("fixed_points", False)
    torch.set_num_threads(1)
    samples = list(Scenes("train", size=(64, 64), count=6))
    if fixed_points:
        same_points_for_every_mask()
    processes = Processes("cpu")

    def on_step(step: int, loss: float) -> None:
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    state, log = run(samples, files=Files(checkpoint=folder / "state.pt", seconds=0.0), processes=processes, on_step=on_step, **changes)
    if processes.first:
        torch.save({"state": state, "losses": log.losses, "resumed_at": log.resumed_at}, folder / "result.pt")
    processes.end()


if __name__ == "__main__":
    main()
