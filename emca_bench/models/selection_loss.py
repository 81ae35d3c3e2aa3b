"""A loss on the choice of pixels: the selection of a matched query is drawn into its true segment."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from emca_kernels.masks import allow_everywhere_if_empty
from torch import Tensor, nn

from emca_bench.errors import UsageError
from emca_bench.models.attention.emca import EMCA, Kept
from emca_bench.models.mask2former import Mask2Former
from emca_bench.models.matcher import Match, Segments

UNSCORED = ("mean", "random")
"""Selections that no score decides."""


def keep_scores(model: nn.Module, on: bool = True) -> None:
    """Have the cross-attentions of a model keep what they choose from, or keep it no more.

    Raises:
        UsageError: none of them chooses by a score.
    """
    scored = [module for module in model.modules() if isinstance(module, EMCA) and module.selection not in UNSCORED]
    if not scored:
        raise UsageError("selection_weight is not 0, but no cross-attention of the model chooses pixels by a score; expected one of EMCA's")
    for module in scored:
        module.keeps_scores, module.kept = on, None


def selection_loss(
    model: Mask2Former,
    matches: Sequence[Sequence[Match]],
    targets: Sequence[Segments],
    *,
    over_processes: Callable[[Tensor], Tensor] = lambda value: value,
) -> Tensor:
    """Minus the log of the softmax weight that a query's scores put into its own segment; a mean over queries, a sum over layers.

    A query's own segment is the one that matching gives to the prediction which made the layer's mask. The softmax is over the allowed
    pixels. Queries without an own segment, or whose mask allows no pixel of it, do not count. Gradients flow through scores alone.

    Args:
        model: it has just made the predictions, in training mode and after `keep_scores`; what it kept is used up.
        matches: of each auxiliary prediction, for each image, see `Criterion.choose`.
        targets: masks bool [T, H, W] of the padded input.
        over_processes: the mean of a number over the processes of a distributed training.
    """
    sums, counts = [], []
    layers = model.sem_seg_head.predictor.transformer_cross_attention_layers
    for layer, of_mask in zip(layers, matches, strict=True):
        attention = layer.multihead_attn
        if not isinstance(attention, EMCA) or attention.kept is None:
            continue
        kept, attention.kept = attention.kept, None
        found = [_missed(kept, image, target, match) for image, (target, match) in enumerate(zip(targets, of_mask, strict=True))]
        sums.append(torch.stack([missed.sum() for missed in found]).sum())
        counts.append(float(sum(missed.numel() for missed in found)))
    total = torch.stack(sums)
    # the mean over the joint batch, so that a run does not depend on the number of its processes
    return (total / over_processes(total.new_tensor(counts)).clamp(min=1)).sum()


def _missed(kept: Kept, image: int, target: Segments, match: Match) -> Tensor:
    """Minus the log of the weight inside, of each matched query of an image that may look there, and each head."""
    # halves are too coarse for a log of a sum
    scores_QMP = kept.scores_BQMP[image].to(torch.promote_types(kept.scores_BQMP.dtype, torch.float32))
    queries, segments = match.queries.to(scores_QMP.device), match.segments.to(target.masks.device)
    # the share of a cell that is in the segment, in 0..1
    inside_NP = F.adaptive_avg_pool2d(target.masks[segments].float(), kept.shape).flatten(1).to(scores_QMP)
    open_NP = torch.ones_like(inside_NP, dtype=torch.bool)
    if kept.allowed_BQP is not None:
        open_NP = allow_everywhere_if_empty(kept.allowed_BQP[image, queries])
    seen_N = (open_NP & (inside_NP > 0)).any(-1)
    scores_NMP = scores_QMP[queries[seen_N]].masked_fill(~open_NP[seen_N][:, None], -torch.inf)
    return (scores_NMP.logsumexp(-1) - (scores_NMP + inside_NP[seen_N].log()[:, None]).logsumexp(-1)).flatten()
