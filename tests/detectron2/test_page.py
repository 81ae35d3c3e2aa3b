"""Commands and blocks of docs/detectron2.md, with small models on generated data."""

from __future__ import annotations

import pickle
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from emca_bench.integrations.detectron2.config import CONFIGS
from emca_bench.integrations.detectron2.train_net import run

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "detectron2.md").read_text()
COMMAND = "python -m emca_bench.integrations.detectron2.train_net "


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_commands_train_resume_and_evaluate(
    tiny: Callable[..., CfgNode], tiny_options: list[str], ade20k: Path, cityscapes: Path, tmp_path: Path
):
    """In the order of the page, in one folder, since some go on from what others wrote."""
    semantic = "ade20k/semantic/mask2former_R50_bs16_160k.yaml"
    arrays = {name: tensor.numpy() for name, tensor in build_model(tiny(semantic)).state_dict().items()}
    (tmp_path / "model_final_500878.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "them"}))
    original = tiny(semantic)
    original.MODEL.META_ARCHITECTURE, original.MODEL.SEM_SEG_HEAD.NAME = "MaskFormer", "MaskFormerHead"
    (tmp_path / "maskformer2_R50_bs16_160k.yaml").write_text(original.dump())

    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) == 7
    for command in commands:
        assert command.startswith(COMMAND)
        arguments = shlex.split(command.removeprefix(COMMAND).replace(" --num-gpus 8", ""))
        # options of the page come last, and win
        keys = next(i for i, word in enumerate([*arguments, "END"]) if re.fullmatch(r"[A-Z_.0-9]+", word))
        assert run([*arguments[:keys], *tiny_options, "SOLVER.MAX_ITER", "2", *arguments[keys:]]) == 0, command
    assert torch.load(tmp_path / "output" / "emca" / "model_final.pth", weights_only=True)["iteration"] == 5
    assert (tmp_path / "out" / "inference" / "sem_seg_evaluation.pth").is_file()


def test_own_data_trains_and_is_scored(tiny_options: list[str], ade20k: Path, tmp_path: Path):
    register, train = blocks("python")[:2]
    for split, source, folder in (("train", "train", "training"), ("val", "val", "validation")):
        target = tmp_path / "facade"
        for link, there in (
            (target / "images" / split, ade20k / "images" / folder),
            (target / "annotations" / split, ade20k / "annotations_detectron2" / folder),
            (target / f"panoptic_{split}", ade20k / f"ade20k_panoptic_{source}"),
            (target / f"panoptic_{split}.json", ade20k / f"ade20k_panoptic_{source}.json"),
        ):
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(there)
    try:
        exec(compile(register, "docs/detectron2.md", "exec"), {})
        small = [*tiny_options, "SOLVER.MAX_ITER", "1", "TEST.EVAL_PERIOD", "1"]
        code = train.replace('NUM_CLASSES 10"', 'NUM_CLASSES 150"').replace("arguments.split()", f"arguments.split() + {small!r}")
        with pytest.raises(SystemExit) as ended:
            exec(compile(code, "docs/detectron2.md", "exec"), {})
        assert ended.value.code == 0
        found = (tmp_path / "out" / "metrics.json").read_text()
        assert all(name in found for name in ("sem_seg/mIoU", "panoptic_seg/PQ", "segm/AP"))
    finally:
        for split in ("train", "val"):
            DatasetCatalog.pop(f"facade_{split}", None)
            MetadataCatalog.pop(f"facade_{split}", None)


def test_own_code_runs():
    code = blocks("python")[2].replace("512, 683", "64, 96").replace("1024", "128").replace("1366", "192")
    found: dict[str, torch.Tensor] = {}
    exec(compile(code, "docs/detectron2.md", "exec"), found)
    assert found["labels"].shape == (128, 192)


def test_the_table_lists_every_configuration():
    shipped = {str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/*/*.yaml")}
    assert set(re.findall(r"`((?:ade20k|cityscapes)/[\w/]+\.yaml)`", PAGE)) == shipped


def test_install_command_is_there():
    (command,) = "".join(blocks("sh")).splitlines()
    assert (ROOT / command).is_file()
    script = (ROOT / command).read_text()
    assert re.search(r"commit=(\w{40})", script)[1] in PAGE
    assert re.search(r"sal-detectron2==([\d.]+)", script)[1] in PAGE
