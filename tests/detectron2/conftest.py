"""Generated data in the layouts of Cityscapes and ADE20K, and configurations of models that train in a second.

Collected by the nox session `tests_detectron2` alone, in an environment of its own; without detectron2 these tests fail.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# detectron2 fixes the paths of its own datasets when it is imported
ROOT = Path(tempfile.mkdtemp(prefix="emca-detectron2-"))
atexit.register(shutil.rmtree, ROOT, ignore_errors=True)
os.environ["DETECTRON2_DATASETS"] = str(ROOT)

# first, since it makes torchvision importable beside a torch without CUDA
import emca_bench.integrations.detectron2  # noqa: E402, F401

# isort: split
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from detectron2.config import CfgNode, get_cfg  # noqa: E402
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402
from PIL import Image  # noqa: E402

from emca_bench.data.ade20k import STUFF  # noqa: E402
from emca_bench.integrations.detectron2 import add_emca_config, config_file  # noqa: E402
from emca_bench.integrations.detectron2.compat import read_labels  # noqa: E402
from emca_bench.integrations.detectron2.mappers import read_panoptic  # noqa: E402

SIZE = (64, 128)

TINY: dict[str, Any] = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.NORM": "SyncBN",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 64,
    "MODEL.MASK_FORMER.DEC_LAYERS": 4,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 12,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 64,
    # random weights are sure of nothing
    "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD": 0.0,
    "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD": 0.0,
    "SOLVER.AMP.ENABLED": False,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 4,
    "SOLVER.CHECKPOINT_PERIOD": 2,
    "TEST.EVAL_PERIOD": 0,
    "INPUT.MIN_SIZE_TRAIN": (48, 64, 96),
    "INPUT.MAX_SIZE_TRAIN": 256,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 128,
    "INPUT.CROP.SIZE": (64, 64),
    "INPUT.SIZE_DIVISIBILITY": 64,
    "DATALOADER.NUM_WORKERS": 0,
}


def flat(options: dict[str, Any]) -> list[Any]:
    return [item for pair in options.items() for item in pair]


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., CfgNode]:
    """A shipped configuration with the numbers of `TINY`, and more options as `{key: value}`."""

    def make(name: str, options: dict[str, Any] | None = None) -> CfgNode:
        cfg = get_cfg()
        add_emca_config(cfg)
        cfg.merge_from_file(config_file(name))
        cfg.merge_from_list(flat(TINY | {"OUTPUT_DIR": str(tmp_path / "out")} | (options or {})))
        return cfg

    return make


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cityscapesscripts leaves a file in the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tiny_options(tmp_path: Path) -> list[str]:
    """The same numbers as arguments of the command line."""
    return [str(item) for item in flat(TINY | {"OUTPUT_DIR": str(tmp_path / "out")})]


@dataclass(frozen=True, eq=False)
class Scene:
    """An image with the class and the segment number of each pixel; segments[n] is (class, thing), number 0 is void."""

    image: np.ndarray
    classes: np.ndarray
    numbers: np.ndarray
    segments: dict[int, tuple[int, bool]]


def draw_scene(rng: np.random.Generator, stuff: list[int], things: list[int], size: tuple[int, int] = SIZE) -> Scene:
    """Two halves of stuff, a void strip, and rectangles of things, two of one class among them."""
    height, width = size
    classes, numbers = np.full(size, 255), np.zeros(size, dtype=np.int64)
    segments: dict[int, tuple[int, bool]] = {}
    kinds = [*rng.choice(stuff, 2, replace=False), *np.repeat(rng.choice(things, 2, replace=False), (2, 1))]
    column = width // 4
    areas = [(slice(2, height // 2), slice(0, width)), (slice(height // 2, height), slice(0, width))]
    areas += [(slice(height // 4, int(height * rng.uniform(0.5, 1))), slice(i * column + 3, (i + 1) * column)) for i in range(3)]
    for number, (kind, area) in enumerate(zip(kinds, areas, strict=True), start=1):
        classes[area], numbers[area] = kind, number
        segments[number] = (int(kind), number > 2)
    palette = np.random.default_rng(0).integers(0, 256, (256, 3))
    image = np.clip(palette[classes] + rng.integers(-20, 20, (*size, 3)), 0, 255).astype(np.uint8)
    return Scene(image, classes.astype(np.uint8), numbers, segments)


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def save_ids(path: Path, ids: np.ndarray) -> None:
    save(path, np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8))


def segment_info(id_: int, category: int, mask: np.ndarray) -> dict[str, Any]:
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    box = [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]
    return {"id": id_, "category_id": category, "area": int(mask.sum()), "bbox": box, "iscrowd": 0}


def save_coco_panoptic(base: Path, images: list[dict], annotations: list[dict], categories: list[dict]) -> None:
    base.with_suffix(".json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


@pytest.fixture(scope="session")
def cityscapes() -> Path:
    """Two images for training and two for validation in Cityscapes' layout, where detectron2 looks for them."""
    from cityscapesscripts.helpers.labels import labels, trainId2label

    scored = {train_id: label for train_id, label in trainId2label.items() if 0 <= train_id < 255}
    things = [train_id for train_id, label in scored.items() if label.hasInstances]
    stuff = [train_id for train_id, label in scored.items() if not label.hasInstances]
    rng = np.random.default_rng(7)
    root = ROOT / "cityscapes"
    for split in ("train", "val"):
        images, annotations = [], []
        for index in range(2):
            scene = draw_scene(rng, stuff, things)
            name = f"town_{index:06d}_000019"
            truth = root / "gtFine" / split / "town" / f"{name}_gtFine"
            label_ids, instance_ids, panoptic = (np.zeros(SIZE, dtype=np.int64) for _ in range(3))
            infos, objects = [], []
            for number, (class_, thing) in scene.segments.items():
                mask = scene.numbers == number
                label_ids[mask] = scored[class_].id
                instance_ids[mask] = scored[class_].id * 1000 + number if thing else scored[class_].id
                panoptic[mask] = instance_ids[mask]
                infos.append(segment_info(int(instance_ids[mask][0]), scored[class_].id, mask))
                x, y, w, h = infos[-1]["bbox"]
                objects.append({"label": scored[class_].name, "polygon": [[x, y], [x + w, y], [x + w, y + h], [x, y + h]]})
            save(root / "leftImg8bit" / split / "town" / f"{name}_leftImg8bit.png", scene.image)
            save(Path(f"{truth}_labelTrainIds.png"), scene.classes)
            polygons = {"imgHeight": SIZE[0], "imgWidth": SIZE[1], "objects": objects}
            Path(f"{truth}_polygons.json").write_text(json.dumps(polygons))
            save(Path(f"{truth}_labelIds.png"), label_ids.astype(np.uint8))
            save(Path(f"{truth}_instanceIds.png"), instance_ids.astype(np.uint16))
            save_ids(root / "gtFine" / f"cityscapes_panoptic_{split}" / f"{name}_gtFine_panoptic.png", panoptic)
            images.append({"id": name, "file_name": f"{name}_gtFine_leftImg8bit.png", "height": SIZE[0], "width": SIZE[1]})
            annotations.append({"image_id": name, "file_name": f"{name}_gtFine_panoptic.png", "segments_info": infos})
        categories = [
            {"id": label.id, "name": label.name, "isthing": int(label.hasInstances)} for label in labels if not label.ignoreInEval
        ]
        save_coco_panoptic(root / "gtFine" / f"cityscapes_panoptic_{split}", images, annotations, categories)
    return root


@pytest.fixture(scope="session")
def ade20k() -> Path:
    """Two images for training and two for validation in ADE20K's layout as Mask2Former prepares it."""
    stuff = [number - 1 for number in sorted(STUFF)]
    things = [index for index in range(150) if index not in stuff]
    rng = np.random.default_rng(7)
    root = ROOT / "ADEChallengeData2016"
    for split, folder in (("train", "training"), ("val", "validation")):
        images, annotations = [], []
        for index in range(2):
            scene = draw_scene(rng, stuff, things, size=(64, 96))
            name = f"ADE_{split}_{index:08d}"
            save(root / "images" / folder / f"{name}.jpg", scene.image)
            save(root / "annotations_detectron2" / folder / f"{name}.png", scene.classes)
            infos = [segment_info(number, class_, scene.numbers == number) for number, (class_, _) in scene.segments.items()]
            save_ids(root / f"ade20k_panoptic_{split}" / f"{name}.png", scene.numbers)
            images.append({"id": name, "file_name": f"{name}.jpg", "height": 64, "width": 96})
            annotations.append({"image_id": name, "file_name": f"{name}.png", "segments_info": infos})
        categories = [{"id": i, "name": str(i), "isthing": int(i in things)} for i in range(150)]
        save_coco_panoptic(root / f"ade20k_panoptic_{split}", images, annotations, categories)
    return root


@dataclass(frozen=True, eq=False)
class Result:
    """What a model would return for one image, as arrays: classes [H, W], ids [H, W] with (id, class), masks with classes and scores."""

    record: dict[str, Any]
    classes: np.ndarray
    ids: np.ndarray
    segments: list[tuple[int, int]]
    masks: np.ndarray
    mask_classes: np.ndarray
    scores: np.ndarray

    def output(self, classes: int, things: set[int]) -> dict[str, Any]:
        """The same in detectron2's convention."""
        one_hot = torch.nn.functional.one_hot(torch.from_numpy(self.classes).long(), classes).permute(2, 0, 1).float()
        segments = [{"id": id_, "category_id": class_, "isthing": class_ in things} for id_, class_ in self.segments]
        instances = Instances(
            self.ids.shape,
            scores=torch.from_numpy(self.scores),
            pred_classes=torch.from_numpy(self.mask_classes),
            pred_masks=torch.from_numpy(self.masks),
            pred_boxes=Boxes(torch.zeros(len(self.masks), 4)),
        )
        return {"sem_seg": one_hot, "panoptic_seg": (torch.from_numpy(self.ids.astype(np.int32)), segments), "instances": instances}


@pytest.fixture
def results() -> Callable[..., list[Result]]:
    """Predictions for every image of a registered panoptic dataset: the truth itself, or disturbed truth."""

    def make(name: str, rng: np.random.Generator | None = None) -> list[Result]:
        metadata = MetadataCatalog.get(name)
        things, classes = set(metadata.thing_dataset_id_to_contiguous_id.values()), len(metadata.stuff_classes)
        truths = [truth_of(record, things) for record in DatasetCatalog.get(name)]
        return truths if rng is None else [disturbed(truth, things, classes, rng) for truth in truths]

    return make


def truth_of(record: dict[str, Any], things: set[int]) -> Result:
    """The truth of a panoptic record as a prediction; ignored pixels are of class 0."""
    truth = read_panoptic(record, 255)
    classes = truth.class_map(255)
    if "sem_seg_file_name" in record:
        classes = read_labels(record["sem_seg_file_name"], dtype=np.int64)
    segments = list(truth.classes.items())
    found = [(id_, class_) for id_, class_ in segments if class_ in things]
    masks = np.stack([truth.ids == id_ for id_, _ in found]) if found else np.zeros((0, *truth.ids.shape), dtype=bool)
    kept = np.isin(truth.ids, list(truth.classes))
    return Result(
        record=record,
        classes=np.where(classes == 255, 0, classes),
        ids=np.where(kept, truth.ids, 0),
        segments=segments,
        masks=masks,
        mask_classes=np.array([class_ for _, class_ in found], dtype=np.int64),
        scores=np.linspace(0.9, 0.8, len(found)).astype(np.float32),
    )


def disturbed(truth: Result, things: set[int], classes: int, rng: np.random.Generator) -> Result:
    """A prediction that is partly right: moved by some pixels, a segment lost, a class mistaken, scores at random, masks doubled."""
    shift = tuple(rng.integers(1, 4, 2))
    ids, labels = (np.roll(array, shift, (0, 1)) for array in (truth.ids, truth.classes))
    lost, mistaken = rng.choice(len(truth.segments), 2, replace=False)
    segments = []
    for index, (id_, class_) in enumerate(truth.segments):
        if index == lost:
            ids[ids == id_] = 0
        elif (ids == id_).any():
            alike = [other for other in range(classes) if (other in things) == (class_ in things)]
            segments.append((id_, int(rng.choice(alike)) if index == mistaken else class_))
    labels[: len(labels) // 5] = rng.integers(0, classes, labels[: len(labels) // 5].shape)
    masks = np.concatenate([np.roll(truth.masks, shift, (1, 2)), truth.masks & (rng.random(truth.masks.shape) > 0.2)])
    return Result(
        record=truth.record,
        classes=labels,
        ids=ids,
        segments=segments,
        masks=masks,
        mask_classes=np.concatenate([truth.mask_classes, truth.mask_classes]),
        scores=rng.random(len(masks)).astype(np.float32),
    )
