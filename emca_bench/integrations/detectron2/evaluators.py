"""detectron2's evaluators, chosen by the dataset's `evaluator_type` and by what the model returns."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    SemSegEvaluator,
)
from detectron2.utils import comm

from emca_bench.errors import UsageError, did_you_mean, listing
from emca_bench.integrations.detectron2.compat import provide_in1d, read_labels
from emca_bench.integrations.detectron2.mappers import join_planes


class InstanceEvaluator(COCOEvaluator):
    """AP of masks by COCO's rules, for models whose classes are things and stuff together.

    Args:
        dataset_name: its records; the truth is its metadata's `json_file`, or is derived from panoptic annotation.
        folder: where results and derived annotation go.
    """

    def __init__(self, dataset_name: str, folder: str) -> None:
        metadata = MetadataCatalog.get(dataset_name)
        index = metadata.thing_dataset_id_to_contiguous_id
        self._rank = {class_: rank for rank, class_ in enumerate(index.values())}
        truth = metadata.get("json_file")
        if not truth or not os.path.isfile(truth):
            truth = os.path.join(folder, f"{dataset_name}_instances.json")
            if comm.is_main_process():
                write_instances_json(dataset_name, truth)
            comm.synchronize()
        # metadata cannot be changed, and the folder may be another than last time
        MetadataCatalog.pop(f"{dataset_name}_things", None)
        things = MetadataCatalog.get(f"{dataset_name}_things")
        things.set(
            json_file=truth,
            thing_classes=[metadata.thing_classes[class_] for class_ in self._rank],
            thing_dataset_id_to_contiguous_id={category: self._rank[class_] for category, class_ in index.items()},
        )
        super().__init__(things.name, tasks=("segm",), output_dir=folder)

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Take the results of some images, classes counted among things."""
        ranked = []
        for output in outputs:
            instances = output["instances"].to("cpu")
            ranks = [self._rank[class_] for class_ in instances.pred_classes.tolist()]
            instances.pred_classes = instances.pred_classes.new_tensor(ranks)
            ranked.append({"instances": instances})
        super().process(inputs, ranked)


def write_instances_json(dataset_name: str, path: str) -> None:
    """COCO's instance annotation with one instance per thing segment of a panoptic dataset; masks do not overlap."""
    metadata = MetadataCatalog.get(dataset_name)
    category = {class_: id_ for id_, class_ in metadata.thing_dataset_id_to_contiguous_id.items()}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for record in DatasetCatalog.get(dataset_name):
        ids = join_planes(detection_utils.read_image(record["pan_seg_file_name"], "RGB"))
        images.append({"id": record["image_id"], "height": ids.shape[0], "width": ids.shape[1]})
        for segment in record["segments_info"]:
            if segment["category_id"] not in category:
                continue
            rle = pycocotools.mask.encode(np.asfortranarray(ids == segment["id"], dtype=np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record["image_id"],
                    "category_id": category[segment["category_id"]],
                    "iscrowd": segment.get("iscrowd", 0),
                    "area": float(pycocotools.mask.area(rle)),
                    "bbox": pycocotools.mask.toBbox(rle).tolist(),
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                }
            )
    categories = [{"id": id_, "name": metadata.thing_classes[class_]} for class_, id_ in category.items()]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


Make = Callable[[str, str], DatasetEvaluator]


def _semantic(dataset_name: str, folder: str) -> DatasetEvaluator:
    return SemSegEvaluator(dataset_name, output_dir=folder, sem_seg_loading_fn=read_labels)


def _panoptic(dataset_name: str, folder: str) -> DatasetEvaluator:
    return COCOPanopticEvaluator(dataset_name, folder)


def _cityscapes_semantic(dataset_name: str, folder: str) -> DatasetEvaluator:
    provide_in1d()
    return CityscapesSemSegEvaluator(dataset_name)


def _cityscapes_instance(dataset_name: str, folder: str) -> DatasetEvaluator:
    provide_in1d()
    return CityscapesInstanceEvaluator(dataset_name)


def _coco_instance(dataset_name: str, folder: str) -> DatasetEvaluator:
    return COCOEvaluator(dataset_name, tasks=("segm",), output_dir=folder)


_IN_COCO_FORMAT: dict[str, Make] = {"SEMANTIC_ON": _semantic, "PANOPTIC_ON": _panoptic, "INSTANCE_ON": InstanceEvaluator}

EVALUATORS: dict[str, dict[str, Make]] = {
    "sem_seg": {"SEMANTIC_ON": _semantic},
    "coco": {"INSTANCE_ON": _coco_instance},
    "coco_panoptic_seg": _IN_COCO_FORMAT,
    "ade20k_panoptic_seg": _IN_COCO_FORMAT,
    "cityscapes_sem_seg": {"SEMANTIC_ON": _cityscapes_semantic},
    "cityscapes_instance": {"INSTANCE_ON": _cityscapes_instance},
    "cityscapes_panoptic_seg": {
        "SEMANTIC_ON": _cityscapes_semantic,
        "PANOPTIC_ON": _panoptic,
        "INSTANCE_ON": _cityscapes_instance,
    },
}
"""By `evaluator_type` and by flag of `MODEL.MASK_FORMER.TEST`."""


def build_evaluator(cfg: CfgNode, dataset_name: str, folder: str | None = None) -> DatasetEvaluator:
    """The evaluators of a dataset for the results that the model returns.

    Semantic evaluation of a panoptic dataset needs `sem_seg_file_name` in its records, and is left out without.

    Args:
        cfg: `MODEL.MASK_FORMER.TEST` says what is returned.
        dataset_name: registered; its metadata has the `evaluator_type`.
        folder: for results; by default `OUTPUT_DIR/inference`.

    Raises:
        UsageError: an unknown `evaluator_type`, or none of its results is returned.
    """
    folder = folder or os.path.join(cfg.OUTPUT_DIR, "inference")
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "")
    if kind not in EVALUATORS:
        raise UsageError(
            f"dataset {dataset_name!r} has evaluator_type {kind!r}{did_you_mean(kind, EVALUATORS)}; known: {listing(EVALUATORS)}"
        )
    makers = {flag: make for flag, make in EVALUATORS[kind].items() if cfg.MODEL.MASK_FORMER.TEST[flag]}
    if makers.get("SEMANTIC_ON") is _semantic and "sem_seg_file_name" not in DatasetCatalog.get(dataset_name)[0]:
        del makers["SEMANTIC_ON"]
    if not makers:
        raise UsageError(
            f"nothing to evaluate on {dataset_name!r}: it scores what MODEL.MASK_FORMER.TEST.{{{', '.join(EVALUATORS[kind])}}} turn on"
        )
    os.makedirs(folder, exist_ok=True)
    return DatasetEvaluators([make(dataset_name, folder) for make in makers.values()])
