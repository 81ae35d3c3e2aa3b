from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import inference_on_dataset

from emca_bench.data.base import Segment
from emca_bench.errors import UsageError
from emca_bench.evaluate.instances import InstanceScore, thing_masks
from emca_bench.evaluate.panoptic import PanopticScore
from emca_bench.evaluate.semantic import SemanticScore
from emca_bench.inference import PanopticSegment
from emca_bench.integrations.detectron2 import build_evaluator
from emca_bench.integrations.detectron2.compat import read_labels
from emca_bench.integrations.detectron2.mappers import read_panoptic
from emca_bench.integrations.detectron2.train_net import Trainer

ADE20K = "ade20k/panoptic/emca_R50_bs16_160k.yaml"
CITYSCAPES = "cityscapes/panoptic/emca_R50_bs16_90k.yaml"


def things_of(name: str) -> set[int]:
    return set(MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id.values())


def scored(cfg: CfgNode, name: str, results: list[Any]) -> dict[str, dict[str, float]]:
    """detectron2's scores of predictions."""
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    classes = len(MetadataCatalog.get(name).stuff_classes)
    for result in results:
        evaluator.process([result.record], [result.output(classes, things_of(name))])
    return evaluator.evaluate()


def our_scores(name: str, results: list[Any]) -> tuple[SemanticScore, PanopticScore, InstanceScore]:
    """The suite's own scores of the same predictions."""
    metadata, things = MetadataCatalog.get(name), things_of(name)
    classes = len(metadata.stuff_classes)
    semantic, panoptic = SemanticScore(classes), PanopticScore([index in things for index in range(classes)])
    instances = InstanceScore(classes)
    for result in results:
        ids = read_panoptic(result.record, 255).ids
        truth = [
            Segment(info["id"], info["category_id"], info["category_id"] in things, bool(info["iscrowd"]))
            for info in result.record["segments_info"]
        ]
        panoptic.add(ids, truth, result.ids, [PanopticSegment(id_, class_, class_ in things, 1.0) for id_, class_ in result.segments])
        masks, categories, crowd = thing_masks(ids, truth)
        instances.add(masks, categories, result.masks, result.mask_classes, result.scores, iscrowd_G=crowd)
        if "sem_seg_file_name" in result.record:
            semantic.add(read_labels(result.record["sem_seg_file_name"], dtype=np.uint8), result.classes)
    return semantic, panoptic, instances


def agree(found: dict[str, dict[str, float]], ours: tuple[SemanticScore, PanopticScore, InstanceScore]) -> None:
    _, panoptic, instances = ours
    for key, value in (
        ("PQ", panoptic.pq()),
        ("SQ", panoptic.sq()),
        ("RQ", panoptic.rq()),
        ("PQ_th", panoptic.pq("things")),
        ("PQ_st", panoptic.pq("stuff")),
    ):
        assert 100 * value == pytest.approx(found["panoptic_seg"][key], abs=1e-6), key
    if "AP75" in found.get("segm", {}):
        for key, iou in (("AP", None), ("AP50", 0.5), ("AP75", 0.75)):
            assert 100 * instances.ap(iou=iou) == pytest.approx(found["segm"][key], abs=1e-6), key


@pytest.fixture
def ade20k_cfg(tiny: Callable[..., CfgNode], ade20k: Path) -> CfgNode:
    return tiny(ADE20K)


@pytest.fixture
def cityscapes_cfg(tiny: Callable[..., CfgNode], cityscapes: Path) -> CfgNode:
    return tiny(CITYSCAPES)


def test_truth_as_prediction_scores_100_on_ade20k(ade20k_cfg: CfgNode, results: Callable[..., list[Any]]):
    found = scored(ade20k_cfg, "ade20k_panoptic_val", results("ade20k_panoptic_val"))
    assert found["sem_seg"]["mIoU"] == 100
    assert found["panoptic_seg"]["PQ"] == found["panoptic_seg"]["PQ_th"] == found["panoptic_seg"]["PQ_st"] == 100
    assert found["segm"]["AP"] == pytest.approx(100)


def test_truth_as_prediction_scores_100_on_cityscapes(cityscapes_cfg: CfgNode, results: Callable[..., list[Any]]):
    found = scored(cityscapes_cfg, "cityscapes_fine_panoptic_val", results("cityscapes_fine_panoptic_val"))
    assert found["sem_seg"]["IoU"] == pytest.approx(100)
    assert found["panoptic_seg"]["PQ"] == 100
    assert (found["segm"]["AP"], found["segm"]["AP50"]) == pytest.approx((100, 100))


def test_our_metrics_agree_on_ade20k(ade20k_cfg: CfgNode, results: Callable[..., list[Any]], seed: int):
    predictions = results("ade20k_panoptic_val", np.random.default_rng(seed))
    found, ours = scored(ade20k_cfg, "ade20k_panoptic_val", predictions), our_scores("ade20k_panoptic_val", predictions)
    assert 0 < found["panoptic_seg"]["PQ"] < 100
    assert 0 < found["segm"]["AP"] < 100
    agree(found, ours)
    assert 100 * ours[0].miou() == pytest.approx(found["sem_seg"]["mIoU"], abs=1e-6)
    assert 100 * ours[0].pixel_accuracy() == pytest.approx(found["sem_seg"]["pACC"], abs=1e-6)


def test_our_metrics_agree_on_cityscapes(cityscapes_cfg: CfgNode, results: Callable[..., list[Any]], seed: int):
    predictions = results("cityscapes_fine_panoptic_val", np.random.default_rng(seed))
    found = scored(cityscapes_cfg, "cityscapes_fine_panoptic_val", predictions)
    ours = our_scores("cityscapes_fine_panoptic_val", predictions)
    assert 0 < found["panoptic_seg"]["PQ"] < 100
    agree(found, ours)
    # cityscapesscripts counts a class that was predicted alone as 0, detectron2's evaluator and ours leave it out
    assert 100 * np.nanmean(ours[0].class_iou()) == pytest.approx(found["sem_seg"]["IoU"], abs=1e-6)


class Recorder:
    """Keeps what a model returned, between the model and detectron2's evaluators."""

    def __init__(self, evaluator: Any) -> None:
        self.evaluator, self.outputs = evaluator, []

    def reset(self) -> None:
        self.evaluator.reset()

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        self.outputs += [(entry, {**output, "instances": output["instances"]}) for entry, output in zip(inputs, outputs, strict=True)]
        self.evaluator.process(inputs, outputs)

    def evaluate(self) -> dict:
        return self.evaluator.evaluate()


def as_result(record: dict[str, Any], output: dict[str, Any]) -> SimpleNamespace:
    ids, segments = output["panoptic_seg"]
    instances = output["instances"]
    return SimpleNamespace(
        record=record,
        classes=output["sem_seg"].argmax(0).numpy(),
        ids=ids.numpy(),
        # the evaluator has put category ids into them, which are class indices in ADE20K
        segments=[(segment["id"], segment["category_id"]) for segment in segments],
        masks=instances.pred_masks.numpy(),
        mask_classes=instances.pred_classes.numpy(),
        scores=instances.scores.numpy(),
    )


def test_our_metrics_agree_on_what_a_trained_model_returns(tiny: Callable[..., CfgNode], ade20k: Path):
    """The same outputs, scored by detectron2's evaluators and by the suite."""
    name = "ade20k_panoptic_train"
    options = {"SOLVER.MAX_ITER": 60, "SOLVER.BASE_LR": 1e-2, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 1.0, "SOLVER.CHECKPOINT_PERIOD": 1000}
    cfg = tiny(ADE20K, options | {"DATASETS.TEST": (name,), "INPUT.CROP.SIZE": (64, 96), "INPUT.MIN_SIZE_TRAIN": (64,)})
    trainer = Trainer(cfg)
    trainer.train()
    recorder = Recorder(build_evaluator(cfg, name))
    found = inference_on_dataset(trainer.model, Trainer.build_test_loader(cfg, name), recorder)
    predictions = [as_result(record, output) for record, (_, output) in zip(DatasetCatalog.get(name), recorder.outputs, strict=True)]
    ours = our_scores(name, predictions)
    agree(found, ours)
    assert 100 * ours[0].miou() == pytest.approx(found["sem_seg"]["mIoU"], abs=1e-6)
    assert found["sem_seg"]["mIoU"] > 0


@pytest.mark.parametrize(
    ("flags", "evaluator_type", "message"),
    [
        ((False, False, False), "coco_panoptic_seg", "nothing to evaluate on"),
        ((True, True, True), "coco_panoptik_seg", "did you mean 'coco_panoptic_seg'?"),
    ],
)
def test_datasets_without_an_evaluator_are_refused(flags, evaluator_type: str, message: str, tiny: Callable[..., CfgNode], ade20k: Path):
    names = ("SEMANTIC_ON", "INSTANCE_ON", "PANOPTIC_ON")
    cfg = tiny(ADE20K, {f"MODEL.MASK_FORMER.TEST.{name}": flag for name, flag in zip(names, flags, strict=True)})
    metadata = MetadataCatalog.get("ade20k_panoptic_val")
    before = metadata.evaluator_type
    del metadata.evaluator_type
    metadata.evaluator_type = evaluator_type
    try:
        with pytest.raises(UsageError, match=message.replace("?", r"\?")):
            build_evaluator(cfg, "ade20k_panoptic_val")
    finally:
        del metadata.evaluator_type
        metadata.evaluator_type = before
