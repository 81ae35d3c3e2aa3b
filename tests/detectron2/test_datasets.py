from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_sem_seg
from PIL import Image

from emca_bench.errors import UsageError
from emca_bench.integrations.detectron2 import build_evaluator, register_ade20k_panoptic, register_coco_panoptic_folder
from emca_bench.integrations.detectron2.evaluators import write_instances_json
from emca_bench.integrations.detectron2.mappers import read_panoptic
from emca_bench.integrations.detectron2.train_net import Trainer

PANOPTIC = "ade20k/panoptic/emca_R50_bs16_160k.yaml"
SEMANTIC = "ade20k/semantic/emca_R50_bs16_160k.yaml"


def real(folder: str) -> Path:
    for root in os.environ.get("EMCA_DATASETS", "").split(os.pathsep):
        if root and (Path(root) / folder).is_dir():
            return Path(root) / folder
    pytest.skip(f"EMCA_DATASETS names no folder with {folder}")


@pytest.fixture
def names() -> Iterator[list[str]]:
    """Names to register; gone after the test."""
    taken: list[str] = []
    yield taken
    for name in taken:
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)
        MetadataCatalog.pop(f"{name}_things", None)


def some_of(annotation: Path, target: Path, count: int, least: int = 2) -> Path:
    """The first annotations of a file with no more segments than an evaluator takes, as a file of its own."""
    whole = json.loads(annotation.read_text())
    kept = [entry for entry in whole["annotations"] if least <= len(entry["segments_info"]) < 80][:count]
    ids = {entry["image_id"] for entry in kept}
    part = {**whole, "annotations": kept, "images": [image for image in whole["images"] if image["id"] in ids]}
    target.write_text(json.dumps(part))
    return target


def scores_of_truth(cfg: CfgNode, name: str, truths: list[Any]) -> dict[str, dict[str, float]]:
    metadata = MetadataCatalog.get(name)
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    for truth in truths:
        output = truth.output(len(metadata.stuff_classes), set(metadata.thing_dataset_id_to_contiguous_id.values()))
        evaluator.process([truth.record], [output])
    return evaluator.evaluate()


def train_and_evaluate(tiny: Callable[..., CfgNode], config: str, name: str, classes: int) -> dict[str, dict[str, float]]:
    sizes = {"INPUT.MIN_SIZE_TRAIN": (96,), "INPUT.MIN_SIZE_TEST": 96, "INPUT.MAX_SIZE_TEST": 160}
    steps = {"SOLVER.MAX_ITER": 2, "TEST.EVAL_PERIOD": 2}
    data = {"DATASETS.TRAIN": (name,), "DATASETS.TEST": (name,), "MODEL.SEM_SEG_HEAD.NUM_CLASSES": classes}
    trainer = Trainer(tiny(config, sizes | steps | data))
    trainer.train()
    return trainer._last_eval_results


@pytest.mark.datasets
def test_coco_sample(tiny: Callable[..., CfgNode], results: Callable[..., list[Any]], names: list[str]):
    root = real("coco_sample")
    names.append("coco_sample")
    register_coco_panoptic_folder(
        "coco_sample", images=root / "val2017", panoptic=root / "panoptic_val2017", panoptic_json=root / "panoptic_val2017.json"
    )
    found = train_and_evaluate(tiny, PANOPTIC, "coco_sample", 133)
    assert set(found) == {"panoptic_seg", "segm"}
    assert math.isfinite(found["panoptic_seg"]["PQ"])
    truth = scores_of_truth(tiny(PANOPTIC), "coco_sample", results("coco_sample"))
    assert truth["panoptic_seg"]["PQ"] == 100
    assert truth["segm"]["AP"] == pytest.approx(100)


@pytest.mark.datasets
def test_facade(tiny: Callable[..., CfgNode], results: Callable[..., list[Any]], names: list[str], tmp_path: Path):
    root = real("facade")
    names.append("facade_val")
    register_coco_panoptic_folder(
        "facade_val",
        images=root / "images" / "val",
        panoptic=root / "panoptic_val",
        panoptic_json=some_of(root / "panoptic_val.json", tmp_path / "some.json", 3),
        semantic=root / "annotations" / "val",
    )
    assert MetadataCatalog.get("facade_val").stuff_classes[:3] == ["window", "balcony-fence", "car"]
    found = train_and_evaluate(tiny, PANOPTIC, "facade_val", 10)
    assert set(found) == {"sem_seg", "panoptic_seg", "segm"}
    truth = scores_of_truth(tiny(PANOPTIC), "facade_val", results("facade_val"))
    assert truth["sem_seg"]["mIoU"] == truth["panoptic_seg"]["PQ"] == 100
    assert truth["segm"]["AP"] == pytest.approx(100)


@pytest.mark.datasets
def test_ade20k_sample_in_ade20ks_own_layout(tiny: Callable[..., CfgNode], results: Callable[..., list[Any]], names: list[str]):
    root = real("ade20k_sample")
    names += ["ade20k_sample_sem_seg", "ade20k_sample_panoptic"]
    images, semantic = root / "images" / "training", root / "annotations_detectron2" / "training"
    DatasetCatalog.register(names[0], lambda: load_sem_seg(str(semantic), str(images), gt_ext="png", image_ext="jpg"))
    known = MetadataCatalog.get("ade20k_sem_seg_val")
    MetadataCatalog.get(names[0]).set(stuff_classes=known.stuff_classes, evaluator_type="sem_seg", ignore_label=255)
    assert math.isfinite(train_and_evaluate(tiny, SEMANTIC, names[0], 150)["sem_seg"]["mIoU"])

    register_coco_panoptic_folder(
        names[1],
        images=images,
        panoptic=root / "ade20k_panoptic_training",
        panoptic_json=root / "ade20k_panoptic_training.json",
        semantic=semantic,
    )
    ours, theirs = (MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id for name in (names[1], "ade20k_panoptic_val"))
    assert set(ours.values()) == set(theirs.values())
    truth = scores_of_truth(tiny(PANOPTIC), names[1], results(names[1]))
    assert truth["sem_seg"]["mIoU"] == truth["panoptic_seg"]["PQ"] == 100
    assert truth["segm"]["AP"] == pytest.approx(100)


def test_ade20k_is_registered_in_mask2formers_layout(ade20k: Path):
    metadata = MetadataCatalog.get("ade20k_panoptic_val")
    assert len(metadata.stuff_classes) == 150
    assert metadata.evaluator_type == "ade20k_panoptic_seg"
    things = [metadata.stuff_classes[i] for i in metadata.thing_dataset_id_to_contiguous_id.values()]
    assert len(things) == 100
    assert {"bed", "person", "door", "car"} <= set(things)
    assert not {"wall", "sky", "floor", "road, route"} & set(things)
    (first, _) = DatasetCatalog.get("ade20k_panoptic_val")
    assert first["image_id"] == "ADE_val_00000000"
    assert first["sem_seg_file_name"].endswith("annotations_detectron2/validation/ADE_val_00000000.png")
    for segment in first["segments_info"]:
        assert segment["isthing"] == (segment["category_id"] in metadata.thing_dataset_id_to_contiguous_id.values())
    register_ade20k_panoptic(ade20k.parent)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One image with category ids 7 (thing), 30 and 31 (stuff), out of order in the json file."""
    ids = np.zeros((6, 8), dtype=np.uint8)
    ids[:3], ids[3:, :4], ids[3:, 4:] = 1, 2, 3
    for name, array in (("images/a.png", np.zeros((6, 8, 3), np.uint8)), ("panoptic/a.png", np.stack([ids, ids * 0, ids * 0], -1))):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(array).save(tmp_path / name)
    annotation = {
        "images": [{"id": 4, "file_name": "a.png", "height": 6, "width": 8}],
        "annotations": [
            {
                "image_id": 4,
                "file_name": "a.png",
                "segments_info": [{"id": 1, "category_id": 30}, {"id": 2, "category_id": 7}, {"id": 3, "category_id": 7, "iscrowd": 1}],
            }
        ],
        "categories": [
            {"id": 31, "name": "sky", "isthing": 0},
            {"id": 7, "name": "car", "isthing": 1},
            {"id": 30, "name": "road", "isthing": 0},
        ],
    }
    (tmp_path / "panoptic.json").write_text(json.dumps(annotation))
    return tmp_path


def register(folder: Path, **changes: Any) -> None:
    options = {"images": folder / "images", "panoptic": folder / "panoptic", "panoptic_json": folder / "panoptic.json"} | changes
    register_coco_panoptic_folder("own_data", **options)


def test_own_data_has_its_categories_in_the_order_of_ids(folder: Path, names: list[str], tmp_path: Path):
    names.append("own_data")
    register(folder)
    assert MetadataCatalog.get("own_data").stuff_classes == ["car", "road", "sky"]
    (record,) = DatasetCatalog.get("own_data")
    assert [(segment["category_id"], segment["isthing"]) for segment in record["segments_info"]] == [(1, False), (0, True), (0, True)]
    assert read_panoptic(record, 255).classes == {1: 1, 2: 0}
    write_instances_json("own_data", str(tmp_path / "instances.json"))
    written = json.loads((tmp_path / "instances.json").read_text())
    assert [(entry["category_id"], entry["iscrowd"], entry["area"]) for entry in written["annotations"]] == [(7, 0, 12.0), (7, 1, 12.0)]
    assert written["categories"] == [{"id": 7, "name": "car"}]
    with pytest.raises(UsageError, match="'own_data' is registered already"):
        register(folder)


def test_what_is_missing_is_named(folder: Path, names: list[str]):
    names.append("own_data")
    with pytest.raises(UsageError, match=r"no panoptic annotation .*nowhere.json"):
        register(folder, panoptic_json=folder / "nowhere.json")
    (folder / "empty.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(UsageError, match="no categories with id, name and isthing"):
        register(folder, panoptic_json=folder / "empty.json")
    register(folder, semantic=folder / "labels")
    with pytest.raises(UsageError, match=r"names .*labels/a.png', which is not there"):
        DatasetCatalog.get("own_data")
    DatasetCatalog.pop("own_data")
    MetadataCatalog.pop("own_data")
    annotation = json.loads((folder / "panoptic.json").read_text())
    annotation["annotations"][0]["segments_info"][0]["category_id"] = 99
    (folder / "panoptic.json").write_text(json.dumps(annotation))
    register(folder)
    with pytest.raises(UsageError, match="a segment of category 99, which is not among the dataset's 3"):
        DatasetCatalog.get("own_data")
