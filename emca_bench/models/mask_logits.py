"""Mask logits that are made where they are read: a training step reads them at sampled points and of matched queries only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emca_bench import onednn
from emca_bench.models.point_sampling import sample_points

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class MaskProduct:
    """Mask logits [B, Q, h, w] as what they are a product of.

    A product of embeddings and features commutes with whatever is linear in the pixels and with any choice of queries: the values of
    all masks at a point are the embeddings times the features there (exact rewrite R2).

    Attributes:
        embeddings: [B, Q, C].
        features: [B, C, h, w], of the same dtype.
    """

    embeddings: Tensor
    features: Tensor

    @property
    def shape(self) -> torch.Size:
        """[B, Q, h, w]."""
        return torch.Size((*self.embeddings.shape[:2], *self.features.shape[2:]))

    @property
    def dtype(self) -> torch.dtype:
        """Of embeddings, features and logits."""
        return self.features.dtype

    @property
    def device(self) -> torch.device:
        """Of embeddings, features and logits."""
        return self.features.device

    def dense(self) -> Tensor:
        """The logits themselves."""
        return (self.embeddings @ self.features.flatten(2)).unflatten(-1, self.features.shape[2:])


Masks = Tensor | MaskProduct
"""Mask logits [B, Q, h, w], made or not."""


@torch.no_grad()
def values_at(masks: Masks, image: int, points_1S2: Tensor) -> Tensor:
    """Bilinear values [Q, S] of all masks of an image at points that they share, at least float32; for matching, without gradients.

    Args:
        masks: of a batch.
        image: index in it.
        points_1S2: (x, y) in 0..1.
    """
    if isinstance(masks, Tensor):
        return sample_points(at_least_float32(masks[image, None]), points_1S2)[0]
    embeddings_QC, features_Chw = masks.embeddings[image], masks.features[image]
    queries, width = embeddings_QC.shape
    # sampled features or all logits, whichever are fewer numbers; halves are multiplied as halves, as the published model does
    if masks.dtype not in HALVES and width * points_1S2.shape[1] < queries * features_Chw[0].numel():
        return embeddings_QC @ sample_points(features_Chw[None], points_1S2)[0]
    return sample_points(at_least_float32(_product(embeddings_QC, features_Chw)[None]), points_1S2)[0]


def logits_of(masks: Sequence[Masks], image: int, queries: Sequence[Tensor]) -> Tensor:
    """Logits [N, h, w] of chosen queries of an image, at least float32.

    Args:
        masks: of a batch, as several predictions have them.
        image: index in the batch.
        queries: int64 indices for each of the predictions; N of them together.
    """
    products = [each for each in masks if isinstance(each, MaskProduct)]
    if len(products) == len(masks) and all(each.features is products[0].features for each in products):
        # one product for all predictions, and one for the gradient of the features that they share
        features_Chw = products[0].features[image]
        embeddings_NC = torch.cat([each.embeddings[image][chosen] for each, chosen in zip(products, queries, strict=True)])
        return at_least_float32(_product(embeddings_NC, features_Chw))
    return torch.cat(
        [
            at_least_float32(each[image][chosen]) if isinstance(each, Tensor) else logits_of([each], image, [chosen])
            for each, chosen in zip(masks, queries, strict=True)
        ]
    )


def _product(embeddings_NC: Tensor, features_Chw: Tensor) -> Tensor:
    """Logits [N, h, w]; without gradients by whatever multiplies fastest."""
    features_CP = features_Chw.flatten(1)
    if torch.is_grad_enabled() or onednn.refuses(features_CP):
        logits_NP = embeddings_NC @ features_CP
    else:
        logits_NP = onednn.linear(embeddings_NC, features_CP.mT)
    return logits_NP.unflatten(-1, features_Chw.shape[1:])


def at_least_float32(tensor: Tensor) -> Tensor:
    """Losses are not computed in half precision."""
    return tensor.float() if tensor.dtype in HALVES else tensor
