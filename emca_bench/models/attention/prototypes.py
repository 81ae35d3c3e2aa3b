"""Prototypes of EMCA as weighted pixels: which ones a mask leaves, and their mean."""

from __future__ import annotations

from typing import NamedTuple

import torch
from emca_kernels.masks import allow_everywhere_if_empty
from torch import Tensor


class ChosenPixels(NamedTuple):
    """Prototypes per query and head as weighted pixels."""

    indices_BQMK: Tensor
    weights_BQMK: Tensor


def mask_or_full(allowed: Tensor | None, features_BPC: Tensor, queries_BQC: Tensor) -> Tensor:
    """The mask, or one that allows everything where there is none."""
    if allowed is not None:
        return allowed
    return torch.ones((), dtype=torch.bool, device=features_BPC.device).expand(*queries_BQC.shape[:2], features_BPC.shape[1])


def random_pixels(allowed_BQP: Tensor, *, heads: int, count: int) -> tuple[Tensor, Tensor]:
    """Indices and scores [B, Q, M, K] of random allowed pixels; the score of one that is not allowed is -inf."""
    # the best allowed pixels of pure noise are random allowed pixels; a half-precision draw has too many ties, and the first win
    noise = torch.rand(*allowed_BQP.shape[:2], heads, allowed_BQP.shape[-1], dtype=torch.float32, device=allowed_BQP.device)
    scores, indices = noise.masked_fill(~allow_everywhere_if_empty(allowed_BQP)[:, :, None], -torch.inf).topk(count, dim=-1)
    return indices, scores


def first_pixel_if_empty(indices_BQMK: Tensor, allowed_BQP: Tensor) -> Tensor:
    """PEM's rule: the reset to "everywhere" fires only where every query of the image is empty."""
    empty_BQ = ~allowed_BQP.any(-1)
    defect_BQ = empty_BQ & ~empty_BQ.all(-1, keepdim=True)
    return indices_BQMK.masked_fill(defect_BQ[..., None, None], 0)


def gather_mean(rows_BPC: Tensor, chosen: ChosenPixels) -> Tensor:
    """Weighted mean of the chosen rows [B, Q, M, C / M]; each head takes its slice of the channels."""
    indices_BQMK, weights_BQMK = chosen
    batch, queries, heads, kept = indices_BQMK.shape
    if heads == 1:
        # no axis of heads: the gradient of an index into one would be a copy of all pixels
        flat = indices_BQMK.reshape(batch, -1)
        gathered_BQMKd = rows_BPC.gather(1, flat[..., None].expand(-1, -1, rows_BPC.shape[-1])).view(batch, queries, 1, kept, -1)
    else:
        rows_BMPd = rows_BPC.unflatten(-1, (heads, -1)).transpose(1, 2)
        flat = indices_BQMK.transpose(1, 2).reshape(batch, heads, -1)
        gathered = rows_BMPd.gather(2, flat[..., None].expand(-1, -1, -1, rows_BMPd.shape[-1]))
        gathered_BQMKd = gathered.view(batch, heads, queries, kept, -1).transpose(1, 2)
    if kept == 1:
        return gathered_BQMKd[..., 0, :]
    return (gathered_BQMKd * weights_BQMK[..., None].to(gathered_BQMKd.dtype)).sum(-2)
