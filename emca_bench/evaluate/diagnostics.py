"""Where the queries of a trained decoder look: prototypes against truth, and what changes from layer to layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from emca_kernels.masks import allow_everywhere_if_empty
from torch import Tensor

from emca_bench.data import Sample
from emca_bench.data.targets import Targets, collate
from emca_bench.models.attention.base import CrossAttention, with_position
from emca_bench.models.attention.emca import EMCA
from emca_bench.models.attention.mask_mean import MaskMean
from emca_bench.models.attention.masked import MaskedCrossAttention
from emca_bench.models.attention.prototypes import first_pixel_if_empty
from emca_bench.models.mask2former import Mask2Former
from emca_bench.models.matcher import match_segments
from emca_bench.models.predictions import Predictions

MATCHING_POINTS = 4096
"""Points at which predictions and truth are compared; fixed by a seed of their own."""

SegmentNumbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Call:
    """What a cross-attention was given."""

    module: CrossAttention
    queries: Tensor
    query_pos: Tensor | None
    features: Tensor
    feature_pos: Tensor | None
    allowed: Tensor
    shape: tuple[int, int]


@dataclass(frozen=True)
class Places:
    """Pixels (y, x) [Q, M, 2] on a grid of (h, w)."""

    pixels_QM2: Tensor
    grid: tuple[int, int]

    def on(self, grid: tuple[int, int]) -> Tensor:
        """The cells of a coarser grid in which the centres of the pixels lie."""
        fine, coarse = (torch.tensor(sides, device=self.pixels_QM2.device) for sides in (self.grid, grid))
        return (2 * self.pixels_QM2 + 1) * coarse // (2 * fine)


class Watched(AbstractContextManager["Watched"]):
    """Notes the calls of the cross-attentions of a model, in order."""

    def __init__(self, model: Mask2Former) -> None:
        self.calls: list[Call] = []
        self._modules = [module for module in model.modules() if isinstance(module, CrossAttention)]
        self._hooks = ExitStack()

    def __enter__(self) -> Watched:
        for module in self._modules:
            handle = module.register_forward_pre_hook(self._note, with_kwargs=True)
            self._hooks.callback(handle.remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hooks.close()

    def _note(self, module: torch.nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        assert isinstance(module, CrossAttention)
        queries, query_pos, features, feature_pos, allowed = positional
        if allowed is None:
            allowed = queries.new_ones((), dtype=torch.bool).expand(*queries.shape[:2], features.shape[1])
        self.calls.append(Call(module, queries, query_pos, features, feature_pos, allowed, named["shape"]))


class Diagnostics:
    """Means over images of what the decoder's layers do; all shares in 0..1.

    A query's own segment is the one that matching gives to the prediction which made the layer's mask. Per layer:

    - `empty_masks`: share of queries whose mask allows no pixel; `empty_masks_matched`: of those that have an own segment.
    - `inside_allowed`: share of a query's allowed pixels that lie in its own segment; `inside_prototypes`: share of its weight on pixels
      that does. Both over queries with an own segment and a mask that is not empty; equal shares mean that choosing adds nothing.
    - `distinct_pixels`: different pixels that carry a query's greatest weight, over the number of queries and heads.
    - `moved_prototypes`: share of those pixels that lie in another cell of the coarser grid than in the layer before.
    - `lost_segments`: share of queries with an own segment that have another one, or none, after the layer.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[int, str], list[float]] = defaultdict(list)
        self._layers = 0

    @torch.inference_mode()
    def add(self, model: Mask2Former, sample: Sample, task: str) -> None:
        """Look at one image; the model is in evaluation mode."""
        device = next(model.parameters()).device
        images, [target] = collate([sample], task)
        target = target.to(device)
        with Watched(model) as watched, torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            mask_features, pyramid = model.sem_seg_head.pixel_decoder(model.backbone_maps(images.to(device)))
            last = model.sem_seg_head.predictor(mask_features, pyramid, image_size=sample.size, auxiliary=True)
            own = [own_segments(prediction, target) for prediction in (*last.auxiliary, last)]
            before: Places | None = None
            for layer, call in enumerate(watched.calls):
                before = self._layer(layer, call, target, own[layer], own[layer + 1], before)
        self._layers = max(self._layers, len(watched.calls))

    def _layer(
        self, layer: int, call: Call, target: Targets, own: SegmentNumbers, after: SegmentNumbers, before: Places | None
    ) -> Places | None:
        """Note one call; returns where its prototypes are."""
        matched = own >= 0
        allowed_QP = call.allowed[0]
        empty = ~allowed_QP.any(-1).cpu().numpy()
        self._note(layer, "empty_masks", empty)
        self._note(layer, "empty_masks_matched", empty[matched])
        self._note(layer, "lost_segments", (after != own)[matched])
        weights_QMP = pixel_weights(call)
        judged = np.flatnonzero(matched & ~empty)
        if len(judged):
            inside_TP = F.interpolate(target.masks[None].float(), size=call.shape, mode="area")[0].flatten(1)
            inside_QP = inside_TP[torch.as_tensor(own[judged], device=inside_TP.device)].to(allowed_QP.device)
            chosen_QP = allowed_QP[judged].to(inside_QP)
            self._note(layer, "inside_allowed", ((inside_QP * chosen_QP).sum(-1) / chosen_QP.sum(-1)).cpu().numpy())
            if weights_QMP is not None:
                shares = (weights_QMP[judged].to(inside_QP) * inside_QP[:, None]).sum(-1)
                self._note(layer, "inside_prototypes", shares.flatten().cpu().numpy())
        if weights_QMP is None or not _chooses(call.module):
            return None
        best_QM = weights_QMP.argmax(-1)
        self._note(layer, "distinct_pixels", np.array([len(head.unique()) / len(head) for head in best_QM.T]))
        places = Places(torch.stack([best_QM // call.shape[1], best_QM % call.shape[1]], -1), call.shape)
        if before is not None and before.pixels_QM2.shape == places.pixels_QM2.shape:
            grid = min(before.grid, places.grid)
            moved = (before.on(grid) != places.on(grid)).any(-1)
            self._note(layer, "moved_prototypes", moved.flatten().cpu().numpy())
        return places

    def _note(self, layer: int, name: str, values: npt.NDArray[Any]) -> None:
        if len(values):
            self._found[layer, name].append(float(values.mean()))

    def values(self) -> list[dict[str, float | None]]:
        """Per layer, the mean over images of each number; None where no image had any."""
        return [{name: self._mean(layer, name) for name in NAMES} for layer in range(self._layers)]

    def _mean(self, layer: int, name: str) -> float | None:
        found = self._found.get((layer, name))
        return float(np.mean(found)) if found else None


NAMES = (
    *("empty_masks", "empty_masks_matched", "inside_allowed", "inside_prototypes", "distinct_pixels", "moved_prototypes"),
    "lost_segments",
)


def own_segments(predictions: Predictions, target: Targets) -> SegmentNumbers:
    """The segment that each query of one image is matched to, int64 [Q], -1 for none."""
    own = np.full(predictions.class_logits.shape[1], -1, dtype=np.int64)
    if len(target.labels):
        [match] = match_segments(predictions, [target], points=MATCHING_POINTS, class_weight=2.0, mask_weight=5.0, dice_weight=5.0)
        own[match.queries.numpy()] = match.segments.numpy()
    return own


def pixel_weights(call: Call) -> Tensor | None:
    """How much each pixel counts for each query and head of the first image, [Q, M, P], rows summing to 1.

    Computed anew from the module's parameters, whatever kernels served the call. Random choice counts as its expectation. None for an
    attention that takes nothing from single pixels, or that is not known.
    """
    if isinstance(call.module, EMCA):
        return _emca_weights(call.module, call)
    if isinstance(call.module, MaskedCrossAttention):
        return _masked_weights(call.module, call)
    return _equal_weights(call) if isinstance(call.module, MaskMean) else None


def _chooses(module: CrossAttention) -> bool:
    """Whether some pixel counts more than others: a mean has none, a random choice is one of a moment."""
    return not (isinstance(module, MaskMean) or (isinstance(module, EMCA) and module.selection in ("mean", "random")))


def _equal_weights(call: Call) -> Tensor:
    open_QP = allow_everywhere_if_empty(call.allowed)[0].to(call.features.dtype)
    return (open_QP / open_QP.sum(-1, keepdim=True))[:, None]


def _emca_weights(module: EMCA, call: Call) -> Tensor:
    scores_QMP = module.scores(call.queries, call.query_pos, call.features, call.feature_pos, shape=call.shape)[0]
    open_QP = allow_everywhere_if_empty(call.allowed)[0]
    share_QMP = _equal_weights(call).expand_as(scores_QMP)
    if module.selection in ("mean", "random"):
        return share_QMP
    scores_QMP = scores_QMP.masked_fill(~open_QP[:, None], -torch.inf)
    if module.selection == "softmax":
        return scores_QMP.softmax(-1)
    best, indices = scores_QMP.topk(module.prototypes, dim=-1)
    if module.selection == "topk_softmax":
        weights_QMK = best.softmax(-1)
    else:
        filled = (best > -torch.inf).to(best.dtype)
        weights_QMK = filled / filled.sum(-1, keepdim=True)
    if module.empty_mask == "first_pixel":
        indices = first_pixel_if_empty(indices[None], call.allowed)[0]
    chosen_QMP = torch.zeros_like(scores_QMP).scatter_add(-1, indices, weights_QMK)
    return (chosen_QMP + share_QMP) / 2 if module.selection == "pool_and_prototype" else chosen_QMP


def _masked_weights(module: MaskedCrossAttention, call: Call) -> Tensor:
    query_weight, key_weight, _ = module.in_proj_weight.chunk(3)
    query_bias, key_bias, _ = module.in_proj_bias.chunk(3)
    queries = F.linear(with_position(call.queries, call.query_pos), query_weight, query_bias)
    keys = F.linear(with_position(call.features, call.feature_pos), key_weight, key_bias)
    open_QP = allow_everywhere_if_empty(call.allowed)[0]
    return _attention(queries, keys, open_QP, module.num_heads, (queries.shape[-1] // module.num_heads) ** -0.5)


def _attention(queries: Tensor, keys: Tensor, open_QP: Tensor, heads: int, scale: Tensor | float) -> Tensor:
    q_MQd, k_MPd = (tokens.expand(1, -1, -1)[0].unflatten(-1, (heads, -1)).transpose(0, 1) for tokens in (queries, keys))
    scores_MQP = q_MQd @ k_MPd.mT * scale
    return scores_MQP.masked_fill(~open_QP, -torch.inf).softmax(-1).transpose(0, 1)


def diagnose(model: Mask2Former, samples: Iterable[Sample], task: str) -> list[dict[str, float | None]]:
    """`Diagnostics` of some images, per decoder layer.

    Args:
        model: put into evaluation mode.
        samples: validation images with truth.
        task: "semantic" or "panoptic": what the segments are.
    """
    found = Diagnostics()
    model.eval()
    for sample in samples:
        found.add(model, sample, task)
    return found.values()
