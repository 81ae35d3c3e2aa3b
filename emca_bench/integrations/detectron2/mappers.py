"""Dataset mappers for training: augmented image, and one boolean mask per class or segment."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, detection_utils
from detectron2.data import transforms as T
from detectron2.projects.point_rend import ColorAugSSDTransform
from detectron2.structures import BitMasks, Instances

from emca_bench.data.base import IMAGE_PADDING
from emca_bench.errors import UsageError, did_you_mean, listing

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LabelMap:
    """Truth as a map: int64 [H, W] of ids, and the class of each id that is a segment; all other ids are void."""

    ids: Ids
    classes: Mapping[int, int]

    def class_map(self, ignore: int) -> Ids:
        """The class of each pixel, `ignore` where there is none."""
        result = np.full_like(self.ids, ignore)
        for id_, category in self.classes.items():
            result[self.ids == id_] = category
        return result


def read_semantic(record: Mapping[str, Any], ignore: int) -> LabelMap:
    """One segment per class present, from `sem_seg_file_name`."""
    ids = detection_utils.read_image(needed(record, "sem_seg_file_name")).astype(np.int64)
    return LabelMap(ids, {int(label): int(label) for label in np.unique(ids) if label != ignore})


def read_panoptic(record: Mapping[str, Any], ignore: int) -> LabelMap:
    """The segments of `pan_seg_file_name` and `segments_info`; crowds are void."""
    ids = join_planes(detection_utils.read_image(needed(record, "pan_seg_file_name"), "RGB"))
    return LabelMap(ids, {info["id"]: info["category_id"] for info in record["segments_info"] if not info.get("iscrowd", 0)})


def needed(record: Mapping[str, Any], key: str) -> Any:
    """An entry of a record, or a UsageError that says what the mapper cannot do without it."""
    if key not in record:
        raise UsageError(
            f"{record['file_name']!r} has no {key!r} in its data set's records; INPUT.DATASET_MAPPER_NAME asks for another kind of data set"
        )
    return record[key]


def split_planes(ids: Ids) -> npt.NDArray[np.uint8]:
    """Ids below 2**24 as an image [H, W, 3]: Pillow resizes bytes by true nearest neighbours, others are resized off by half a pixel."""
    return np.stack([ids & 0xFF, ids >> 8 & 0xFF, ids >> 16 & 0xFF], -1).astype(np.uint8)


def join_planes(planes: npt.NDArray[np.uint8]) -> Ids:
    """The inverse of `split_planes`, and how COCO stores panoptic ids."""
    red, green, blue = (planes[..., plane].astype(np.int64) for plane in range(3))
    return red + 256 * green + 65536 * blue


class MaskFormerMapper:
    """A record of detectron2's catalog to a training input: `image`, and `instances` with `gt_classes` and `gt_masks`.

    Args:
        read: the truth of a record as a map, or None for `annotations` with masks that may overlap.
        augmentations: of detectron2.
        image_format: "RGB" or what the backbone wants.
        size_divisibility: sides are padded to multiples of this, the image with mid-grey, masks with nothing; below 1 not.
        ignore: label of ignored pixels.
        classes: of the model; truth of others is refused.
        constrained: whether an augmentation looks at the classes.
    """

    def __init__(
        self,
        *,
        read: Callable[[Mapping[str, Any], int], LabelMap] | None,
        augmentations: Sequence[Any],
        image_format: str,
        size_divisibility: int,
        ignore: int,
        classes: int,
        constrained: bool,
    ) -> None:
        self.read, self.augmentations, self.image_format = read, T.AugmentationList(list(augmentations)), image_format
        self.size_divisibility, self.ignore = size_divisibility, ignore
        self.classes, self.constrained = classes, constrained

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Read, augment, pad.

        Raises:
            UsageError: a record without the truth that is read, labels of another size than the image, or a class out of range.
        """
        record = copy.deepcopy(dataset_dict)
        image = detection_utils.read_image(record["file_name"], format=self.image_format)
        detection_utils.check_image_size(record, image)
        truth = None if self.read is None else self.read(record, self.ignore)
        if truth is not None and truth.ids.shape != image.shape[:2]:
            raise UsageError(f"labels of {record['file_name']!r} are {truth.ids.shape}, expected {image.shape[:2]} as its image")
        classes = truth.class_map(self.ignore) if truth is not None and self.constrained else None
        # detectron2 resizes bytes and floats only
        augmented = T.AugInput(image, sem_seg=None if classes is None else classes.astype(np.float32))
        transforms = self.augmentations(augmented)
        size = augmented.image.shape[:2]
        if truth is not None:
            labels, masks = _masks_of_map(truth, transforms)
        else:
            labels, masks = _masks_of_annotations(needed(record, "annotations"), transforms, size)
            del record["annotations"]
        # on a GPU a class out of range ends in an assertion without a name
        if len(labels) and int(labels.max()) >= self.classes:
            found = f"{record['file_name']!r} has class {int(labels.max())}"
            raise UsageError(f"{found}; expected 0..{self.classes - 1} (MODEL.SEM_SEG_HEAD.NUM_CLASSES), {self.ignore} where ignored")
        bottom, right = (-side % self.size_divisibility if self.size_divisibility > 0 else 0 for side in size)
        pixels = torch.as_tensor(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))
        record["image"] = F.pad(pixels, (0, right, 0, bottom), value=IMAGE_PADDING)
        instances = Instances((size[0] + bottom, size[1] + right))
        instances.gt_classes = labels
        instances.gt_masks = BitMasks(F.pad(masks, (0, right, 0, bottom)))
        record["instances"] = instances
        return record


def _masks_of_map(truth: LabelMap, transforms: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes int64 [T] and masks bool [T, h, w] of the segments that are still in the picture."""
    ids = join_planes(transforms.apply_segmentation(split_planes(truth.ids)))
    present = set(np.unique(ids).tolist())
    kept = [id_ for id_ in truth.classes if id_ in present]
    masks = torch.from_numpy(ids) == torch.tensor(kept, dtype=torch.int64)[:, None, None]
    return torch.tensor([truth.classes[id_] for id_ in kept], dtype=torch.int64), masks


def _masks_of_annotations(annotations: list[dict[str, Any]], transforms: Any, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for annotated instances, polygons or run lengths; crowds are left out."""
    kept = [
        detection_utils.transform_instance_annotations(annotation, transforms, size)
        for annotation in annotations
        if not annotation.get("iscrowd", 0)
    ]
    if not kept:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, *size, dtype=torch.bool)
    instances = detection_utils.annotations_to_instances(kept, size, mask_format="bitmask")
    present = instances.gt_masks.nonempty()
    return instances.gt_classes[present], instances.gt_masks.tensor[present]


MAPPERS: dict[str, tuple[Callable[[Mapping[str, Any], int], LabelMap] | None, bool]] = {
    "mask_former_semantic": (read_semantic, False),
    "mask_former_panoptic": (read_panoptic, False),
    "mask_former_instance": (None, False),
    "coco_panoptic_lsj": (read_panoptic, True),
    "coco_instance_lsj": (None, True),
}
"""What `INPUT.DATASET_MAPPER_NAME` may be: how truth is read, and whether the scale jitter is COCO's."""


def build_mapper(cfg: CfgNode) -> MaskFormerMapper:
    """The training mapper named by `INPUT.DATASET_MAPPER_NAME`.

    Raises:
        UsageError: an unknown name.
    """
    name = cfg.INPUT.DATASET_MAPPER_NAME
    if name not in MAPPERS:
        raise UsageError(f"INPUT.DATASET_MAPPER_NAME is {name!r}{did_you_mean(name, MAPPERS)}; expected one of {listing(MAPPERS)}")
    read, large_scale_jitter = MAPPERS[name]
    ignore = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("ignore_label", 255)
    return MaskFormerMapper(
        read=read,
        augmentations=large_scale_augmentations(cfg) if large_scale_jitter else augmentations(cfg, ignore),
        image_format=cfg.INPUT.FORMAT,
        size_divisibility=-1 if large_scale_jitter else cfg.INPUT.SIZE_DIVISIBILITY,
        ignore=ignore,
        classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        constrained=not large_scale_jitter and cfg.INPUT.CROP.ENABLED and cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA < 1,
    )


def augmentations(cfg: CfgNode, ignore: int) -> list[Any]:
    """Shortest edge from a list, fixed crop, SSD colour jitter, flip: `INPUT` of ADE20K and Cityscapes."""
    crop = cfg.INPUT.CROP
    result = [T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING)]
    if crop.ENABLED:
        result.append(T.RandomCrop_CategoryAreaConstraint(crop.TYPE, crop.SIZE, crop.SINGLE_CATEGORY_MAX_AREA, ignore))
    if cfg.INPUT.COLOR_AUG_SSD:
        result.append(ColorAugSSDTransform(img_format=cfg.INPUT.FORMAT))
    return result + _flip(cfg)


def large_scale_augmentations(cfg: CfgNode) -> list[Any]:
    """Flip, scale by a factor in MIN_SCALE..MAX_SCALE, crop or pad to IMAGE_SIZE: `INPUT` of COCO."""
    size = cfg.INPUT.IMAGE_SIZE
    return [
        *_flip(cfg),
        T.ResizeScale(min_scale=cfg.INPUT.MIN_SCALE, max_scale=cfg.INPUT.MAX_SCALE, target_height=size, target_width=size),
        T.FixedSizeCrop(crop_size=(size, size), pad_value=float(IMAGE_PADDING)),
    ]


def _flip(cfg: CfgNode) -> list[Any]:
    kind = cfg.INPUT.RANDOM_FLIP
    return [] if kind == "none" else [T.RandomFlip(horizontal=kind == "horizontal", vertical=kind == "vertical")]
