"""The meta-architecture: detectron2's list of dicts in, losses or results out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone, build_sem_seg_head
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from torch import Tensor, nn

from emca_bench.errors import UsageError
from emca_bench.inference import instances, panoptic, semantic_scores
from emca_bench.integrations.detectron2.config import check_model
from emca_bench.integrations.detectron2.head import EMCAMaskFormerHead
from emca_bench.models.criterion import Criterion
from emca_bench.models.mask2former import SIZE_DIVISIBILITY
from emca_bench.models.predictions import Predictions

ORIGINAL_HEAD = "MaskFormerHead"


@dataclass(frozen=True)
class Results:
    """Which results inference returns and how: `MODEL.MASK_FORMER.TEST` and what goes with it.

    Attributes:
        semantic, panoptic, instance: which of `sem_seg`, `panoptic_seg` and `instances` are in the result of an image.
        object_threshold, overlap_threshold: see `emca_bench.inference.panoptic`.
        resize_masks: resize masks, not class scores, to the size of the result; always so beside panoptic or instance results.
        most: instances per image.
        things: per class, whether it is countable.
    """

    semantic: bool
    panoptic: bool
    instance: bool
    object_threshold: float
    overlap_threshold: float
    resize_masks: bool
    most: int
    things: tuple[bool, ...]


@dataclass(frozen=True, eq=False)
class Truth:
    """The truth of one image on the padded input: labels int64 [T], masks bool [T, H, W]."""

    labels: Tensor
    masks: Tensor


@META_ARCH_REGISTRY.register()
class EMCAMaskFormer(nn.Module):
    """Mask2Former with a pluggable cross-attention, for detectron2's trainer, evaluators and checkpoints.

    State-dict names and shapes are those of Mask2Former's `MaskFormer`.

    Args:
        backbone: returns maps "res2" to "res5".
        sem_seg_head: pixel decoder and mask decoder.
        criterion: the loss.
        results: what inference returns.
        pixel_mean, pixel_std: of the channels in the order of the input.
        size_divisibility: sides of a batch are padded to multiples of this.
        deep_supervision: whether predictions of all layers are trained.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: EMCAMaskFormerHead,
        criterion: Criterion,
        results: Results,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        size_divisibility: int = SIZE_DIVISIBILITY,
        deep_supervision: bool = True,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.criterion = criterion
        self.results = results
        self.size_divisibility = size_divisibility
        self.deep_supervision = deep_supervision
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Arguments from a configuration with the keys of `add_emca_config`.

        Raises:
            UsageError: a value that is not implemented.
        """
        check_model(cfg)
        if cfg.MODEL.SEM_SEG_HEAD.NAME == ORIGINAL_HEAD:
            # the original's name of the same head, so that its configurations need one changed key only
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL.SEM_SEG_HEAD.NAME = EMCAMaskFormerHead.__name__
        former = cfg.MODEL.MASK_FORMER
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "sem_seg_head": build_sem_seg_head(cfg, backbone.output_shape()),
            "criterion": Criterion(
                classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
                points=former.TRAIN_NUM_POINTS,
                class_weight=former.CLASS_WEIGHT,
                mask_weight=former.MASK_WEIGHT,
                dice_weight=former.DICE_WEIGHT,
                no_object_weight=former.NO_OBJECT_WEIGHT,
                oversampling=former.OVERSAMPLE_RATIO,
                importance=former.IMPORTANCE_SAMPLE_RATIO,
            ),
            "results": results_from_config(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "size_divisibility": former.SIZE_DIVISIBILITY if former.SIZE_DIVISIBILITY > 0 else SIZE_DIVISIBILITY,
            "deep_supervision": former.DEEP_SUPERVISION,
        }

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Losses in training mode, else results.

        Args:
            batched_inputs: a dict per image. `image`: [3, h, w] in 0..255, channels in the order of `INPUT.FORMAT`. In training
                `instances` with `gt_classes` [T] and `gt_masks` [T, h, w]. Else optionally `height` and `width` of the result.

        Returns:
            Training: weighted losses by name. Else a dict per image, each key where it is on: `sem_seg` [classes, height, width],
            `panoptic_seg` (int32 [height, width], segments as dicts), `instances` (`Instances`, best first).

        Raises:
            UsageError: training inputs without `instances`.
        """
        normalised = [(entry["image"].to(self.device) - self.pixel_mean) / self.pixel_std for entry in batched_inputs]
        images = ImageList.from_tensors(normalised, self.size_divisibility)
        padded = (int(images.tensor.shape[-2]), int(images.tensor.shape[-1]))
        predictions = self.sem_seg_head(self.backbone(images.tensor), image_size=padded)
        if self.training:
            return self._losses(predictions, batched_inputs, padded)
        results = []
        for index, (entry, size) in enumerate(zip(batched_inputs, images.image_sizes, strict=True)):
            own = slice(index, index + 1)
            of_image = Predictions(
                predictions.class_logits[own].float(), predictions.mask_logits[own].float(), (int(size[0]), int(size[1]))
            )
            results.append(self._results(of_image, (int(entry.get("height", size[0])), int(entry.get("width", size[1])))))
        return results

    def _losses(self, predictions: Predictions, batched_inputs: list[dict[str, Any]], padded: tuple[int, int]) -> dict[str, Tensor]:
        if not self.deep_supervision:
            predictions = replace(predictions, auxiliary=())
        targets = [self._truth(entry, padded) for entry in batched_inputs]
        return self.criterion.weighted(self.criterion(predictions, targets))

    def _truth(self, entry: dict[str, Any], padded: tuple[int, int]) -> Truth:
        if "instances" not in entry:
            raise UsageError(
                f"training input {entry.get('file_name', '')!r} has no 'instances'; expected gt_classes and gt_masks, see build_mapper"
            )
        truth = entry["instances"].to(self.device)
        masks = truth.gt_masks.tensor if isinstance(truth.gt_masks, BitMasks) else truth.gt_masks
        height, width = masks.shape[-2:]
        return Truth(truth.gt_classes, F.pad(masks.bool(), (0, padded[1] - width, 0, padded[0] - height)))

    def _results(self, predictions: Predictions, size: tuple[int, int]) -> dict[str, Any]:
        wanted = self.results
        found: dict[str, Any] = {}
        if wanted.semantic:
            found["sem_seg"] = semantic_scores(predictions, size, resize_masks=wanted.resize_masks)[0]
        if wanted.panoptic:
            (result,) = panoptic(
                predictions,
                size,
                things=wanted.things,
                object_threshold=wanted.object_threshold,
                overlap_threshold=wanted.overlap_threshold,
            )
            segments = [{"id": segment.id, "isthing": segment.thing, "category_id": segment.category} for segment in result.segments]
            found["panoptic_seg"] = (result.ids, segments)
        if wanted.instance:
            (best,) = instances(predictions, size, things=wanted.things, most=wanted.most)
            boxes = Boxes(boxes_of(best.masks))
            found["instances"] = Instances(size, scores=best.scores, pred_classes=best.categories, pred_masks=best.masks, pred_boxes=boxes)
        return found


def boxes_of(masks_NHW: Tensor) -> Tensor:
    """Tight (x0, y0, x1, y1) around boolean masks, float32 [N, 4]; zeros around an empty one."""
    edges = []
    for occupied in (masks_NHW.any(1), masks_NHW.any(2)):
        first = occupied.int().argmax(1)
        end = occupied.shape[1] - occupied.flip(1).int().argmax(1)
        edges.append((first, torch.where(occupied.any(1), end, 0)))
    (x0, x1), (y0, y1) = edges
    return torch.stack([x0, y0, x1, y1], 1).float()


def results_from_config(cfg: CfgNode) -> Results:
    """What `MODEL.MASK_FORMER.TEST` asks for, with the things of the first training dataset.

    Raises:
        UsageError: panoptic results without a dataset that says which classes are things.
    """
    test = cfg.MODEL.MASK_FORMER.TEST
    classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    dataset = cfg.DATASETS.TRAIN[0] if len(cfg.DATASETS.TRAIN) else None
    known = None if dataset is None else MetadataCatalog.get(dataset).get("thing_dataset_id_to_contiguous_id")
    if known is None and test.PANOPTIC_ON:
        raise UsageError(
            f"MODEL.MASK_FORMER.TEST.PANOPTIC_ON needs a panoptic dataset as DATASETS.TRAIN[0], which knows the things; found {dataset!r}"
        )
    things = set(range(classes)) if known is None else set(known.values())
    return Results(
        semantic=test.SEMANTIC_ON,
        panoptic=test.PANOPTIC_ON,
        instance=test.INSTANCE_ON,
        object_threshold=test.OBJECT_MASK_THRESHOLD,
        overlap_threshold=test.OVERLAP_THRESHOLD,
        resize_masks=test.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE or test.PANOPTIC_ON or test.INSTANCE_ON,
        most=cfg.TEST.DETECTIONS_PER_IMAGE,
        things=tuple(index in things for index in range(classes)),
    )
