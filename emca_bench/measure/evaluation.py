"""A trained model against the test images: one forward pass an image, all results of it scored, a few kept to look at."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from emca_bench.data import IGNORE, VOID, ClassInfo, Dataset, Sample, Segment
from emca_bench.errors import UsageError
from emca_bench.evaluate.instances import InstanceScore, thing_masks
from emca_bench.evaluate.panoptic import Group, PanopticScore
from emca_bench.evaluate.semantic import SemanticScore
from emca_bench.inference import Instances, Panoptic, PanopticSegment, instances, panoptic, semantic
from emca_bench.models import Predictions
from emca_bench.models.mask2former import Mask2Former
from emca_bench.records import write_atomically
from emca_bench.specs import canonical_json
from emca_bench.train.feed import Samples

SHOWN_IMAGES = 4
"""Test images whose predictions are kept, spread over the split."""

GROUPS: dict[Group, str] = {"all": "", "things": "_things", "stuff": "_stuff"}
"""Groups of classes, and how the names of their values in a record end."""

AP_VALUES: dict[str, dict[str, Any]] = {
    "ap": {},
    "ap50": {"iou": 0.5},
    "ap75": {"iou": 0.75},
    "ap_small": {"area": "small"},
    "ap_medium": {"area": "medium"},
    "ap_large": {"area": "large"},
}

Labels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class PanopticRules:
    """Thresholds of panoptic inference; of the instances, those kept to look at have at least the first as their score."""

    object_threshold: float = 0.8
    overlap_threshold: float = 0.8


@dataclass(frozen=True)
class Results:
    """What one forward pass gives for one image; the last two where they were asked for."""

    labels: Labels
    panoptic: Panoptic | None = None
    instances: Instances | None = None


class Evaluation:
    """Scores over the images of a test split.

    Args:
        classes: of the labels.
        rules: of panoptic inference; None to score label maps alone.
    """

    def __init__(self, classes: Sequence[ClassInfo], rules: PanopticRules | None) -> None:
        self.classes, self.rules = classes, rules
        self.things = [info.thing for info in classes]
        self.semantic = SemanticScore(len(classes))
        self.panoptic = PanopticScore(self.things)
        self.instances = InstanceScore(len(classes))

    def add(self, sample: Sample, predictions: Predictions) -> Results:
        """Score the predictions for one image.

        Raises:
            UsageError: panoptic results of a sample without panoptic truth.
        """
        labels: Labels = semantic(predictions, sample.size)[0].cpu().numpy().astype(np.uint8)
        self.semantic.add(sample.semantic, labels)
        if self.rules is None:
            return Results(labels)
        truth = panoptic_truth(sample)
        thresholds = {"object_threshold": self.rules.object_threshold, "overlap_threshold": self.rules.overlap_threshold}
        [whole] = panoptic(predictions, sample.size, things=self.things, **thresholds)
        self.panoptic.add(truth, sample.segments, whole.ids.cpu().numpy(), whole.segments)
        [single] = instances(predictions, sample.size, things=self.things)
        masks, categories, iscrowd = thing_masks(truth, sample.segments)
        found = (single.masks.cpu().numpy(), single.categories.cpu().numpy(), single.scores.cpu().numpy())
        self.instances.add(masks, categories, *found, iscrowd_G=iscrowd)
        return Results(labels, whole, single)

    def values(self) -> dict[str, Any]:
        """What a record keeps, in 0..100; None for what no test image has.

        Raises:
            UsageError: the test images have no labelled pixel at all.
        """
        if np.isnan(self.semantic.miou()):
            raise UsageError("the test images have no labelled pixel; expected at least one to score")
        found: dict[str, Any] = {
            "miou": 100 * self.semantic.miou(),
            "class_iou": self._by_class(self.semantic.class_iou()),
            "pixel_accuracy": 100 * self.semantic.pixel_accuracy(),
        }
        if self.rules is None:
            return found
        for group, suffix in GROUPS.items():
            for name in ("pq", "sq", "rq"):
                found[name + suffix] = _percent(getattr(self.panoptic, name)(group))
        found |= {name: _percent(self.instances.ap(**options)) for name, options in AP_VALUES.items()}
        by_class = {"class_pq": self.panoptic.class_pq(), "class_ap": self.instances.class_ap()}
        return found | {name: self._by_class(values) for name, values in by_class.items()}

    def _by_class(self, values: npt.NDArray[np.float64]) -> dict[str, float | None]:
        return {info.name: _percent(value) for info, value in zip(self.classes, values, strict=True)}


def evaluate(model: Mask2Former, test: Samples, scores: Evaluation, *, shown: Path, on_image: Callable[[int], None]) -> None:
    """Score a model on all test images at their own resolution, and keep some of its results as PNG.

    Args:
        model: whose predictions are taken once per image.
        test: images with truth.
        scores: are added to.
        shown: folder for the kept results: label maps, and with panoptic rules segments and instances too.
        on_image: called with the number of images done.
    """
    device = next(model.parameters()).device
    numbers = {index: number for number, index in enumerate(shown_indices(len(test)))}
    model.eval()
    with torch.inference_mode():
        for index in range(len(test)):
            sample = test[index]
            # a permuted view of an RGB image is already channels-last
            image = torch.from_numpy(sample.image.copy())[None].permute(0, 3, 1, 2).float().to(device)
            results = scores.add(sample, model(image))
            if index in numbers:
                stem = shown / f"{numbers[index]:02}"
                _write_png(stem.with_suffix(".png"), results.labels)
                if results.panoptic is not None:
                    ids = results.panoptic.ids.cpu().numpy()
                    _write_png(Path(f"{stem}_panoptic.png"), segment_image(ids, results.panoptic.segments))
                if results.instances is not None and scores.rules is not None:
                    _write_png(Path(f"{stem}_instances.png"), instance_image(results.instances, scores.rules.object_threshold))
            on_image(index + 1)


def panoptic_truth(sample: Sample) -> npt.NDArray[np.int32]:
    """The panoptic map of a sample; UsageError where it has none."""
    if sample.panoptic is None:
        raise UsageError(f"sample {sample.name!r} has semantic labels only; expected panoptic labels, or the task 'semantic'")
    return sample.panoptic


def segment_image(ids_HW: npt.NDArray[np.integer], segments: Sequence[Segment | PanopticSegment]) -> Labels:
    """Segments as an image [H, W, 3]: class index or IGNORE in red, number of the segment from 1 in green + 256 blue, 0 for none."""
    known = {VOID: (IGNORE, 0), **{entry.id: (entry.category, number) for number, entry in enumerate(segments, start=1)}}
    present, places = np.unique(ids_HW, return_inverse=True)
    rows = [(known[int(id_)][0], known[int(id_)][1] % 256, known[int(id_)][1] // 256) for id_ in present]
    return np.array(rows, dtype=np.uint8)[places.reshape(ids_HW.shape)]


def instance_image(found: Instances, least: float) -> Labels:
    """Instances with at least a score, better ones over worse ones, as `segment_image` writes segments."""
    masks, scores, categories = (part.cpu().numpy() for part in (found.masks, found.scores, found.categories))
    ids = np.zeros(masks.shape[1:], dtype=np.int64)
    segments = [Segment(number, int(category), True) for number, category in enumerate(categories, start=1)]
    for index in reversed(np.flatnonzero(scores >= least)):
        ids[masks[index]] = index + 1
    return segment_image(ids, segments)


def shown_indices(count: int) -> list[int]:
    """Test images that are kept to look at, spread over the split."""
    return sorted({int(position) for position in np.linspace(0, count - 1, min(SHOWN_IMAGES, count)).round()})


def write_shown_images(dataset: Dataset, test: Samples, folder: Path, *, segments: bool) -> None:
    """Image and truth of the shown test images, and the classes with their colours: what overlays are painted from."""
    classes = [{"name": info.name, "thing": info.thing, "color": list(info.color)} for info in dataset.classes]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "classes.json", canonical_json(classes))
    for number, index in enumerate(shown_indices(len(test))):
        sample, place = test[index], folder / f"{number:02}"
        _write_png(place / "image.png", sample.image)
        _write_png(place / "truth.png", sample.semantic)
        if segments:
            _write_png(place / "truth_panoptic.png", segment_image(panoptic_truth(sample), sample.segments))


def _percent(share: float) -> float | None:
    return None if np.isnan(share) else 100 * float(share)


def _write_png(path: Path, pixels: Labels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    # cells side by side write the same shown images
    write_atomically(path, content.getvalue())
