"""Panoptic datasets for detectron2's catalogs: ADE20K in Mask2Former's layout, and one's own in COCO's format."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import ADE20K_SEM_SEG_CATEGORIES

from emca_bench.data.ade20k import STUFF
from emca_bench.data.base import IGNORE
from emca_bench.errors import UsageError


def register_coco_panoptic_folder(
    name: str,
    *,
    images: str | Path,
    panoptic: str | Path,
    panoptic_json: str | Path,
    semantic: str | Path | None = None,
    instances_json: str | Path | None = None,
) -> None:
    """Register a dataset in COCO's panoptic format, with the categories of its json file.

    Class `i` of the model is the i-th category in the order of category ids; `MODEL.SEM_SEG_HEAD.NUM_CLASSES` is their number.

    Args:
        name: for `DATASETS.TRAIN` or `DATASETS.TEST`.
        images: folder of the images, named as `file_name` in the json file's `images`.
        panoptic: folder of the PNG files, segment id = R + 256 G + 65536 B, 0 for none.
        panoptic_json: COCO's panoptic annotation.
        semantic: folder of PNG files with class indices and 255 for ignored pixels, for mIoU; None for none.
        instances_json: COCO's instance annotation with the same image ids, for AP; None derives it from the panoptic one.

    Raises:
        UsageError: a name that is taken, or a json file that is not there or not panoptic.
    """
    categories = _categories(Path(panoptic_json))
    _register(
        name,
        categories=categories,
        paths={"image_root": str(images), "panoptic_root": str(panoptic), "panoptic_json": str(panoptic_json)},
        semantic=None if semantic is None else str(semantic),
        instances_json=None if instances_json is None else str(instances_json),
        evaluator_type="coco_panoptic_seg",
    )


def register_ade20k_panoptic(root: str | Path) -> None:
    """Register `ade20k_panoptic_train` and `_val` below `root/ADEChallengeData2016`, in the layout of Mask2Former's preparation.

    Names that are registered already (by Mask2Former itself, say) stay as they are.
    """
    folder = Path(root) / "ADEChallengeData2016"
    categories = [
        {"id": index, "name": name, "isthing": int(index + 1 not in STUFF)} for index, name in enumerate(ADE20K_SEM_SEG_CATEGORIES)
    ]
    for split, images in (("train", "training"), ("val", "validation")):
        name = f"ade20k_panoptic_{split}"
        if name in DatasetCatalog:
            continue
        panoptic = folder / f"ade20k_panoptic_{split}"
        _register(
            name,
            categories=categories,
            paths={"image_root": str(folder / "images" / images), "panoptic_root": str(panoptic), "panoptic_json": f"{panoptic}.json"},
            semantic=str(folder / "annotations_detectron2" / images),
            instances_json=str(folder / f"ade20k_instance_{split}.json"),
            evaluator_type="ade20k_panoptic_seg",
        )


def _categories(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UsageError(f"no panoptic annotation {str(path)!r}; expected a json file in COCO's panoptic format")
    categories = json.loads(path.read_text()).get("categories")
    if not categories or not all({"id", "name", "isthing"} <= set(category) for category in categories):
        raise UsageError(f"{str(path)!r} has no categories with id, name and isthing; expected COCO's panoptic format")
    return sorted(categories, key=lambda category: category["id"])


def _register(
    name: str,
    *,
    categories: Sequence[Mapping[str, Any]],
    paths: dict[str, str],
    semantic: str | None,
    instances_json: str | None,
    evaluator_type: str,
) -> None:
    if name in DatasetCatalog:
        raise UsageError(f"dataset {name!r} is registered already; choose another name or DatasetCatalog.remove it")
    index = {category["id"]: position for position, category in enumerate(categories)}
    names = [category["name"] for category in categories]
    colors = [category["color"] for category in categories if "color" in category]
    DatasetCatalog.register(name, lambda: load_panoptic(paths, index, {c["id"] for c in categories if c["isthing"]}, semantic))
    MetadataCatalog.get(name).set(
        **paths,
        thing_dataset_id_to_contiguous_id={category["id"]: index[category["id"]] for category in categories if category["isthing"]},
        # of all classes, since SemSegEvaluator looks things up here too
        stuff_dataset_id_to_contiguous_id=index,
        # class indices are common to things and stuff, and so are the lists that they point into
        thing_classes=names,
        stuff_classes=names,
        **({"thing_colors": colors, "stuff_colors": colors} if len(colors) == len(names) else {}),
        json_file=instances_json,
        evaluator_type=evaluator_type,
        ignore_label=IGNORE,
        label_divisor=1000,
    )


def load_panoptic(
    paths: Mapping[str, str], index: Mapping[int, int], things: set[int], semantic: str | None = None
) -> list[dict[str, Any]]:
    """Records of a COCO-panoptic dataset in detectron2's format, class indices in `segments_info`.

    Args:
        paths: `image_root`, `panoptic_root` and `panoptic_json`.
        index: category id to class index.
        things: category ids of things.
        semantic: folder of semantic PNG files, or None.

    Raises:
        UsageError: a file that is not there, or a category that is not known.
    """
    if not os.path.isfile(paths["panoptic_json"]):
        raise UsageError(f"no panoptic annotation {paths['panoptic_json']!r}; is DETECTRON2_DATASETS set to the folder of the datasets?")
    annotation = json.loads(Path(paths["panoptic_json"]).read_text())
    images = {image["id"]: image for image in annotation["images"]}
    records = []
    for entry in annotation["annotations"]:
        image = images[entry["image_id"]]
        record = {
            "file_name": os.path.join(paths["image_root"], image["file_name"]),
            "image_id": entry["image_id"],
            "height": image["height"],
            "width": image["width"],
            "pan_seg_file_name": os.path.join(paths["panoptic_root"], entry["file_name"]),
            "segments_info": [_segment(segment, index, things, entry["file_name"]) for segment in entry["segments_info"]],
        }
        if semantic is not None:
            record["sem_seg_file_name"] = os.path.join(semantic, os.path.splitext(image["file_name"])[0] + ".png")
        records.append(record)
    for key in ("file_name", "pan_seg_file_name", "sem_seg_file_name"):
        if records and key in records[0] and not os.path.isfile(records[0][key]):
            raise UsageError(f"{paths['panoptic_json']!r} names {records[0][key]!r}, which is not there")
    return records


def _segment(segment: Mapping[str, Any], index: Mapping[int, int], things: set[int], file_name: str) -> dict[str, Any]:
    category = segment["category_id"]
    if category not in index:
        raise UsageError(f"{file_name!r} has a segment of category {category}, which is not among the dataset's {len(index)}")
    return {**segment, "category_id": index[category], "isthing": category in things}


register_ade20k_panoptic(os.environ.get("DETECTRON2_DATASETS", "datasets"))
