from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser

from emca_bench.integrations.detectron2.train_net import Trainer, main, run

SEMANTIC = "ade20k/semantic/emca_R50_bs16_160k.yaml"


def losses(folder: str | Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (Path(folder) / "metrics.json").read_text().splitlines()]
    return {line["iteration"]: line["total_loss"] for line in lines if "total_loss" in line}


def trained(cfg: CfgNode, *, resume: bool = False) -> Trainer:
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


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
    results = trained(cfg)._last_eval_results
    assert set(results) == set(metrics)
    for task, names in metrics.items():
        assert names <= set(results[task])
        assert all(math.isfinite(results[task][name]) for name in names)
    assert losses(cfg.OUTPUT_DIR)
    assert all(math.isfinite(loss) for loss in losses(cfg.OUTPUT_DIR).values())


def test_training_lowers_the_loss(tiny: Callable[..., CfgNode], cityscapes: Path):
    options = {
        "SOLVER.MAX_ITER": 40,
        "SOLVER.BASE_LR": 5e-3,
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 1.0,
        "SOLVER.CHECKPOINT_PERIOD": 1000,
        "SEED": 7,
    }
    cfg = tiny("cityscapes/semantic/emca_R50_bs16_90k.yaml", options)
    trainer = trained(cfg)
    history = [value for value, _ in trainer.storage.history("total_loss").values()]
    assert len(history) == 40
    assert sum(history[-8:]) / 8 < 0.9 * sum(history[:4]) / 4


def test_resume_goes_on_where_the_checkpoint_ends(tiny: Callable[..., CfgNode], ade20k: Path):
    first = trained(tiny(SEMANTIC, {"SOLVER.MAX_ITER": 4}))
    saved = torch.load(Path(first.cfg.OUTPUT_DIR) / "model_final.pth", weights_only=True)
    assert saved["iteration"] == 3
    assert (Path(first.cfg.OUTPUT_DIR) / "last_checkpoint").read_text() == "model_final.pth"

    second = Trainer(tiny(SEMANTIC, {"SOLVER.MAX_ITER": 6}))
    second.resume_or_load(resume=True)
    assert second.start_iter == 4
    for name, tensor in second.model.state_dict().items():
        assert torch.equal(tensor, saved["model"][name]), name
    moments = [state["exp_avg"] for state in second.optimizer.state_dict()["state"].values()]
    kept = [state["exp_avg"] for state in saved["trainer"]["_trainer"]["optimizer"]["state"].values()]
    assert len(moments) == len(kept) > 0
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(moments, kept, strict=True))
    second.train()
    assert torch.load(Path(second.cfg.OUTPUT_DIR) / "model_final.pth", weights_only=True)["iteration"] == 5


def test_command_line_trains_resumes_and_evaluates(tiny_options: list[str], ade20k: Path, tmp_path: Path):
    call = ["--config-file", SEMANTIC]
    assert run([*call, *tiny_options]) == 0
    assert run([*call, "--resume", *tiny_options, "SOLVER.MAX_ITER", "6"]) == 0
    saved = tmp_path / "out" / "model_final.pth"
    assert torch.load(saved, weights_only=True)["iteration"] == 5

    arguments = [*call, "--eval-only", *tiny_options, "MODEL.WEIGHTS", str(saved), "OUTPUT_DIR", str(tmp_path / "evaluated")]
    results = main(default_argument_parser().parse_args(arguments))
    assert 0 <= results["sem_seg"]["mIoU"] <= 100
    assert (tmp_path / "evaluated" / "inference" / "sem_seg_evaluation.pth").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "19"], "has 150 classes, MODEL.SEM_SEG_HEAD.NUM_CLASSES is 19"),
        (["TEST.AUG.ENABLED", "True"], "TEST.AUG.ENABLED is True; implemented: False"),
        (["MODEL.MASK_FORMER.DROPOUT", "0.1"], "MODEL.MASK_FORMER.DROPOUT is 0.1; implemented: 0.0"),
        (["MODEL.MASK_FORMER.CROSS_ATTENTION.NAME", "emac"], "unknown attention 'emac' (did you mean 'emca'?)"),
        (["MODEL.MASK_FORMER.CROSS_ATTENTION.NAME", "none", "MODEL.MASK_FORMER.CROSS_ATTENTION.PROTOTYPES", "4"], "no switch 'prototypes'"),
        (["INPUT.DATASET_MAPPER_NAME", "mask_former_panoptik"], "did you mean 'mask_former_panoptic'?"),
        (["SOLVER.OPTIMIZER", "ADAM"], "expected one of ADAMW, SGD"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_sentence(
    changes: list[str], message: str, tiny_options: list[str], ade20k: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(["--config-file", SEMANTIC, *tiny_options, *changes]) == 2
    assert message in capsys.readouterr().err


def test_unknown_configuration_lists_the_shipped_ones(capsys: pytest.CaptureFixture[str]):
    assert run(["--config-file", "ade20k/semantic/emca_R101.yaml"]) == 2
    assert SEMANTIC in capsys.readouterr().err


def test_evaluation_refuses_a_model_with_random_parts(tiny_options: list[str], ade20k: Path, tmp_path: Path, capsys):
    assert run(["--config-file", SEMANTIC, "--eval-only", *tiny_options]) == 2
    assert "--eval-only needs weights" in capsys.readouterr().err
    assert run(["--config-file", SEMANTIC, *tiny_options, "SOLVER.MAX_ITER", "1"]) == 0
    weights = ["MODEL.WEIGHTS", str(tmp_path / "out" / "model_final.pth"), "MODEL.MASK_FORMER.CROSS_ATTENTION.NAME", "masked"]
    assert run(["--config-file", SEMANTIC, "--eval-only", *tiny_options, *weights]) == 2
    message = capsys.readouterr().err
    assert "multihead_attn.in_proj_weight" in message
    assert "CROSS_ATTENTION.NAME" in message
