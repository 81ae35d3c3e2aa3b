from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode

from emca_bench.integrations.detectron2.train_net import Trainer, run

SEMANTIC = "ade20k/semantic/emca_R50_bs16_160k.yaml"
PANOPTIC = "cityscapes/panoptic/emca_R50_bs16_90k.yaml"


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return {line["iteration"]: line["total_loss"] for line in lines if "total_loss" in line}


@pytest.mark.parametrize(
    ("config", "metrics"),
    [
        ("ade20k/semantic/mask2former_R50_bs16_160k.yaml", {"sem_seg": {"mIoU"}}),
        ("ade20k/semantic/emca_R50_bs16_160k.yaml", {"sem_seg": {"mIoU"}}),
        ("ade20k/panoptic/emca_R50_bs16_160k.yaml", {"sem_seg": {"mIoU"}, "panoptic_seg": {"PQ", "PQ_th"}, "segm": {"AP"}}),
        ("cityscapes/semantic/mask2former_R50_bs16_90k.yaml", {"sem_seg": {"IoU"}}),
        ("cityscapes/panoptic/emca_R50_bs16_90k.yaml", {"sem_seg": {"IoU"}, "panoptic_seg": {"PQ"}, "segm": {"AP", "AP50"}}),
    ],
)
def test_every_task_trains_and_ends_with_the_scores_of_its_evaluators(
    config: str, metrics: dict[str, set[str]], tiny: Callable[..., CfgNode], cityscapes: Path, ade20k: Path
):
    cfg = tiny(config, {"SOLVER.MAX_ITER": 2, "TEST.EVAL_PERIOD": 2})
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    results = trainer._last_eval_results
    assert set(results) == set(metrics)
    for task, names in metrics.items():
        assert names <= set(results[task])
    assert all(math.isfinite(loss) for loss in losses(Path(cfg.OUTPUT_DIR)).values())
