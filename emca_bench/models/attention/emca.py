"""EMCA and its family: a prototype per query, then element-wise attention. Every switch of the definition, one module.

Source: Weerakoon & Thayasivam, Rethinking Mask2Former for Efficient Semantic Segmentation, 2025 (no code published); Cavagnero et
al., PEM, CVPR 2024, for `pem_ca` and `pem_ca_published`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from emca_kernels import Projections, attend_prototypes, emca_attention, pool_prototypes, select_prototypes
from emca_kernels.attend_prototypes.op import NORM_AXES
from emca_kernels.backends import known_backends
from emca_kernels.emca_attention.arguments import SELECTIONS as SELECTIONS_AT_ONCE
from emca_kernels.masks import allow_everywhere_if_empty
from torch import Tensor, nn

from emca_bench.errors import UsageError, did_you_mean
from emca_bench.models.attention.base import ATTENTIONS, CrossAttention, with_position

SELECTIONS = ("argmax", "topk_mean", "topk_softmax", "random", "mean", "softmax")
RESIDUALS = ("projected", "raw")
EMPTY_MASKS = ("everywhere", "first_pixel")
QUERY_INITS = ("xavier", "identity")


class Chosen(NamedTuple):
    """Prototypes per query and head as weighted pixels."""

    indices_BQMK: Tensor
    weights_BQMK: Tensor


class LocalConv(nn.Module):
    """Batch norm and a depth-wise 3x3 convolution on the feature map, in front of the keys (PEM)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, features_BPC: Tensor, shape: tuple[int, int]) -> Tensor:
        """[B, P, C] to [B, P, C] on a map of the given (h, w)."""
        return self.conv(self.norm(features_BPC.mT.unflatten(-1, shape))).flatten(2).mT


class EMCA(CrossAttention):
    """Efficient masked cross-attention (SPEC section 1).

    Gradients flow through the gathered rows only; none through scores, choice or mask. `selection="softmax"` is the member of the
    family whose selection is trained.

    Args:
        width: model width C, and key width D.
        heads: each head chooses its own pixel; the slices are concatenated.
        prototypes: K pixels per query and head, 1 <= K <= P. Only for argmax (K = 1), topk_* and random.
        selection: "argmax"; "topk_mean" and "topk_softmax" average the K best; "random" takes random allowed pixels; "mean" and
            "softmax" weigh all allowed pixels (mask pooling, soft prototypes with a learnable temperature).
        normalize_keys: 2-norm of keys and queries over all D, before the heads are split.
        local_conv: batch norm and depth-wise 3x3 convolution on the features.
        query_norm: LayerNorm in front of W_Q.
        norm_axis: "row" or "queries", see `emca_kernels.attend_prototypes`.
        residual: "projected" adds the projected query, "raw" the query as it came, without its position.
        positions: whether positional embeddings are added to features and queries.
        empty_mask: "everywhere" per query, as Mask2Former; "first_pixel" is PEM's: pixel 0 unless all queries of the image are empty.
        folded: score raw features with folded queries (exact rewrite R1). None folds where that is cheaper and possible.
        query_init: "xavier", or "identity" so that a projected residual starts as the raw one.
        backend: of its operators, for measurements; None takes the fastest that serves a call.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        prototypes: int = 1,
        selection: str = "argmax",
        normalize_keys: bool = False,
        local_conv: bool = False,
        query_norm: bool = False,
        norm_axis: str = "row",
        residual: str = "projected",
        positions: bool = True,
        empty_mask: str = "everywhere",
        folded: bool | None = None,
        query_init: str = "xavier",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        for switch, found, known in (
            ("selection", selection, SELECTIONS),
            ("norm_axis", norm_axis, NORM_AXES),
            ("residual", residual, RESIDUALS),
            ("empty_mask", empty_mask, EMPTY_MASKS),
            ("query_init", query_init, QUERY_INITS),
        ):
            if found not in known:
                raise UsageError(f"{switch}={found!r}{did_you_mean(str(found), known)}; expected one of {', '.join(known)}")
        served = known_backends("pool_prototypes" if selection in ("mean", "softmax") else "select_prototypes")
        if backend is not None and backend not in served:
            raise UsageError(f"backend={backend!r}{did_you_mean(backend, served)}; expected one of {', '.join(served)}")
        if heads < 1 or width % heads:
            raise UsageError(f"heads={heads} must divide the model width {width}")
        if prototypes < 1 or (prototypes > 1 and selection in ("argmax", "mean", "softmax")):
            raise UsageError(f"prototypes={prototypes} with selection={selection!r}: expected 1, or topk_mean, topk_softmax or random")
        if empty_mask == "first_pixel" and selection in ("mean", "softmax"):
            raise UsageError(f"empty_mask='first_pixel' with selection={selection!r}: expected everywhere, a pool has no first pixel")
        if folded and normalize_keys:
            raise UsageError("folded=true needs normalize_keys=false: a norm per key cannot be folded into the query")
        self.width, self.heads, self.prototypes, self.selection = width, heads, prototypes, selection
        self.normalize_keys, self.norm_axis, self.residual = normalize_keys, norm_axis, residual
        self.positions, self.empty_mask = positions, empty_mask
        self.folded, self.normalises_queries, self.backend = folded, query_norm, backend
        self.tail_backend = backend if backend in known_backends("attend_prototypes") else None
        self.local_conv = LocalConv(width) if local_conv else None
        self.query_norm = nn.LayerNorm(width) if query_norm else None
        self.key_projection = nn.Linear(width, width)
        self.query_projection = nn.Linear(width, width)
        self.product_projection = nn.Linear(width, width)
        self.out_projection = nn.Linear(width, width)
        self.alpha = nn.Parameter(torch.ones(width))
        if selection == "softmax":
            self.log_scale = nn.Parameter(torch.tensor(-0.5 * math.log(width // heads)))
        self._reset_parameters(query_init)

    def _reset_parameters(self, query_init: str) -> None:
        for projection in (self.key_projection, self.query_projection, self.product_projection, self.out_projection):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)
        if query_init == "identity":
            nn.init.eye_(self.query_projection.weight)

    def forward(
        self,
        queries: Tensor,
        query_pos: Tensor | None,
        features: Tensor,
        feature_pos: Tensor | None,
        allowed: Tensor | None,
        *,
        shape: tuple[int, int],
    ) -> Tensor:
        """See `CrossAttention.forward`."""
        located = with_position(queries, query_pos) if self.positions else queries
        source_BPC, position_BPC = features, feature_pos if self.positions else None
        if self.local_conv is not None:
            source_BPC, position_BPC = self.local_conv(with_position(features, position_BPC), shape), None
        if self._is_one_operator(features.shape[1], queries.shape[1]):
            return self._attend_at_once(queries, query_pos if self.positions else None, source_BPC, position_BPC, allowed)
        projected_BQD = self.query_projection(located if self.query_norm is None else self.query_norm(located))
        compared_BQD = F.normalize(projected_BQD, dim=-1) if self.normalize_keys else projected_BQD

        if self._folds(features.shape[1], queries.shape[1]):
            prototypes_BQD = self._prototypes_folded(source_BPC, position_BPC, compared_BQD, allowed)
        else:
            prototypes_BQD = self._prototypes_from_keys(self.keys(with_position(source_BPC, position_BPC)), compared_BQD, allowed)
        update = attend_prototypes(
            prototypes_BQD,
            compared_BQD,
            self.product_projection.weight,
            self.product_projection.bias,
            self.alpha,
            self.out_projection.weight,
            self.out_projection.bias,
            norm_axis=self.norm_axis,
            backend=self.tail_backend,
        )
        return update + (projected_BQD if self.residual == "projected" else queries)

    def _is_one_operator(self, pixels: int, queries: int) -> bool:
        """Whether `emca_attention` is this very layer."""
        plain = (
            self.heads == self.prototypes == 1 and self.query_norm is None and self.norm_axis == "row" and self.empty_mask == "everywhere"
        )
        served = self.backend is None or self.backend in known_backends("emca_attention")
        return plain and served and self.selection in SELECTIONS_AT_ONCE and self._folds(pixels, queries)

    def _attend_at_once(
        self, queries: Tensor, query_pos: Tensor | None, source_BPC: Tensor, position_BPC: Tensor | None, allowed: Tensor | None
    ) -> Tensor:
        return emca_attention(
            source_BPC,
            queries,
            _mask_or_full(allowed, source_BPC, queries) if self.selection == "mean" else allowed,
            Projections(
                self.query_projection.weight,
                self.query_projection.bias,
                self.key_projection.weight,
                self.key_projection.bias,
                self.product_projection.weight,
                self.product_projection.bias,
                self.alpha,
                self.out_projection.weight,
                self.out_projection.bias,
            ),
            position=position_BPC,
            query_position=query_pos,
            scale=self.log_scale.exp() if self.selection == "softmax" else None,
            selection=self.selection,
            residual=self.residual,
            backend=self.backend,
        )

    def keys(self, source_BPC: Tensor) -> Tensor:
        """Projected and, where the switch says so, normalised keys [B, P, D]."""
        keys_BPD = self.key_projection(source_BPC)
        return F.normalize(keys_BPD, dim=-1) if self.normalize_keys else keys_BPD

    def _folds(self, pixels: int, queries: int) -> bool:
        if self.folded is not None:
            return self.folded
        if self.normalize_keys:
            return False
        return self._macs(pixels, queries, folded=True) < self._macs(pixels, queries, folded=False)

    def _prototypes_from_keys(self, keys_BPD: Tensor, queries_BQD: Tensor, allowed: Tensor | None) -> Tensor:
        if self.selection == "mean":
            return pool_prototypes(keys_BPD, None, _mask_or_full(allowed, keys_BPD, queries_BQD), backend=self.backend).flatten(2)
        if self.selection == "softmax":
            scaled = queries_BQD * self.log_scale.exp()
            return pool_prototypes(keys_BPD, scaled, allowed, heads=self.heads, backend=self.backend).flatten(2)
        chosen = self._choose(keys_BPD, queries_BQD, allowed, heads=self.heads)
        keys_BMPd = keys_BPD.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return _gather_mean(keys_BMPd, chosen).flatten(2)

    def _prototypes_folded(self, source_BPC: Tensor, position_BPC: Tensor | None, queries_BQD: Tensor, allowed: Tensor | None) -> Tensor:
        """The same prototypes from raw features: with queries folded per head, rows are projected after they are gathered."""
        if self.selection == "mean":
            full = _mask_or_full(allowed, source_BPC, queries_BQD)
            return self.key_projection(pool_prototypes(source_BPC, None, full, position=position_BPC, backend=self.backend).flatten(2))
        folded_BQMC = self._fold(queries_BQD)
        per_head = None if allowed is None else allowed.repeat_interleave(self.heads, dim=1) if self.heads > 1 else allowed
        if self.selection == "softmax":
            scaled = folded_BQMC.flatten(1, 2) * self.log_scale.exp()
            rows_BQMC = pool_prototypes(source_BPC, scaled, per_head, position=position_BPC, backend=self.backend)
            rows_BQMC = rows_BQMC.view_as(folded_BQMC)
        else:
            chosen = self._choose(source_BPC, folded_BQMC.flatten(1, 2), per_head, heads=1, position=position_BPC)
            chosen = Chosen(*(part.flatten(1, 2).unflatten(1, folded_BQMC.shape[1:3]) for part in chosen))
            rows_BQMC = _gather_mean(source_BPC[:, None], chosen)
            if position_BPC is not None:
                rows_BQMC = rows_BQMC + _gather_mean(position_BPC.expand_as(source_BPC)[:, None], chosen)
        return self._project_rows(rows_BQMC)

    def _fold(self, queries_BQD: Tensor) -> Tensor:
        """W_K taken to the side of the queries, [B, Q, M, C]."""
        if self.heads == 1:
            return (queries_BQD @ self.key_projection.weight)[:, :, None]
        weight_MdC = self.key_projection.weight.unflatten(0, (self.heads, -1))
        return torch.einsum("bqmd,mdc->bqmc", queries_BQD.unflatten(-1, (self.heads, -1)), weight_MdC)

    def _project_rows(self, rows_BQMC: Tensor) -> Tensor:
        """Keys [B, Q, D] of a row per head, each head's own slice."""
        if self.heads == 1:
            return self.key_projection(rows_BQMC[:, :, 0])
        weight_MdC = self.key_projection.weight.unflatten(0, (self.heads, -1))
        return torch.einsum("bqmc,mdc->bqmd", rows_BQMC, weight_MdC).flatten(2) + self.key_projection.bias

    @torch.no_grad()
    def _choose(self, features: Tensor, queries: Tensor, allowed: Tensor | None, *, heads: int, position: Tensor | None = None) -> Chosen:
        if self.selection == "random":
            # the best allowed pixels of pure noise are random allowed pixels; a half-precision draw has too many ties, and the first win
            noise = torch.rand(*queries.shape[:2], heads, features.shape[1], dtype=torch.float32, device=features.device)
            open_BQP = allow_everywhere_if_empty(_mask_or_full(allowed, features, queries))
            scores, indices = noise.masked_fill(~open_BQP[:, :, None], -torch.inf).topk(self.prototypes, dim=-1)
        else:
            options: dict[str, Any] = {"k": self.prototypes, "heads": heads, "position": position, "backend": self.backend}
            indices, scores = select_prototypes(features, queries, allowed, **options)
        if self.empty_mask == "first_pixel" and allowed is not None:
            indices = _first_pixel_if_empty(indices, allowed)
        return Chosen(indices, self._weights(scores.to(features.dtype)))

    def _weights(self, scores: Tensor) -> Tensor:
        if self.prototypes == 1:
            return scores.new_ones(()).expand_as(scores)
        if self.selection == "topk_softmax":
            return (scores / math.sqrt(self.width // self.heads)).softmax(-1)
        filled = (scores > -torch.inf).to(scores.dtype)
        return filled / filled.sum(-1, keepdim=True)

    def macs(self, *, pixels: int, queries: int) -> int:
        """See `CrossAttention.macs`."""
        return self._macs(pixels, queries, folded=self._folds(pixels, queries))

    def _macs(self, pixels: int, queries: int, *, folded: bool) -> int:
        """Keys, scores and pooling, local convolution; then the projections Q, A and out, and folding in and out.

        Folded, each head scores and pools all channels.
        """
        passes = {"random": 0, "mean": 1, "softmax": 2}.get(self.selection, 1)
        heads = self.heads if folded and self.selection != "mean" else 1
        keys = 0 if folded else self.width**2
        local = 0 if self.local_conv is None else 9 * self.width
        projections = 3 + (0 if not folded else 1 if self.selection == "mean" else 2)
        return pixels * (passes * heads * queries * self.width + keys + local) + projections * queries * self.width**2


def _mask_or_full(allowed: Tensor | None, features: Tensor, queries: Tensor) -> Tensor:
    if allowed is not None:
        return allowed
    return torch.ones((), dtype=torch.bool, device=features.device).expand(*queries.shape[:2], features.shape[1])


def _first_pixel_if_empty(indices_BQMK: Tensor, allowed_BQP: Tensor) -> Tensor:
    """PEM's rule: the reset to "everywhere" fires only where every query of the image is empty."""
    empty_BQ = ~allowed_BQP.any(-1)
    defect_BQ = empty_BQ & ~empty_BQ.all(-1, keepdim=True)
    return indices_BQMK.masked_fill(defect_BQ[..., None, None], 0)


def _gather_mean(rows_BMPd: Tensor, chosen: Chosen) -> Tensor:
    """Weighted mean of the chosen rows, [B, Q, M, d]. A source with one head serves all heads."""
    indices_BQMK, weights_BQMK = chosen
    batch, queries, heads, kept = indices_BQMK.shape
    if rows_BMPd.shape[1] == 1:
        flat = indices_BQMK.reshape(batch, -1)
        # squeezed, not indexed: the gradient of an index is a copy of all pixels
        gathered = rows_BMPd.squeeze(1).gather(1, flat[..., None].expand(-1, -1, rows_BMPd.shape[-1]))
        gathered_BQMKd = gathered.view(batch, queries, heads, kept, -1)
    else:
        flat = indices_BQMK.transpose(1, 2).reshape(batch, heads, -1)
        gathered = rows_BMPd.gather(2, flat[..., None].expand(-1, -1, -1, rows_BMPd.shape[-1]))
        gathered_BQMKd = gathered.view(batch, heads, queries, kept, -1).transpose(1, 2)
    if kept == 1:
        return gathered_BQMKd[..., 0, :]
    return (gathered_BQMKd * weights_BQMK[..., None].to(gathered_BQMKd.dtype)).sum(-2)


@ATTENTIONS.register("emca")
def emca(
    *,
    width: int,
    heads: int = 1,
    prototypes: int = 1,
    selection: str = "argmax",
    normalize_keys: bool = False,
    local_conv: bool = False,
    query_norm: bool = False,
    norm_axis: str = "row",
    residual: str = "projected",
    positions: bool = True,
    empty_mask: str = "everywhere",
    folded: bool | None = None,
    query_init: str = "xavier",
    backend: str | None = None,
) -> EMCA:
    """EMCA as the paper states it."""
    return EMCA(**locals())


@ATTENTIONS.register("pem_ca")
def pem_ca(
    *,
    width: int,
    heads: int = 8,
    norm_axis: str = "row",
    residual: str = "raw",
    empty_mask: str = "everywhere",
    local_conv: bool = True,
) -> EMCA:
    """PEM-CA with the two defects of PEM's code mended: no coupling of queries, and an empty mask looks everywhere."""
    return EMCA(**locals(), normalize_keys=True, query_norm=True)


@ATTENTIONS.register("pem_ca_published")
def pem_ca_published(
    *,
    width: int,
    heads: int = 8,
    norm_axis: str = "queries",
    residual: str = "raw",
    empty_mask: str = "first_pixel",
    local_conv: bool = True,
) -> EMCA:
    """PEM-CA as PEM's code has it, its query-coupling norm and its empty-mask rule included: what PEM's checkpoints were trained with."""
    return EMCA(**locals(), normalize_keys=True, query_norm=True)


@ATTENTIONS.register("emca_soft")
def emca_soft(
    *,
    width: int,
    heads: int = 1,
    residual: str = "raw",
    folded: bool | None = None,
    positions: bool = True,
    backend: str | None = None,
) -> EMCA:
    """Soft prototypes: one trainable softmax over the allowed pixels, keys and values folded (R6), EMCA's element-wise tail."""
    return EMCA(**locals(), selection="softmax")


@ATTENTIONS.register("mask_pooling")
def mask_pooling(
    *,
    width: int,
    heads: int = 1,
    residual: str = "projected",
    folded: bool | None = None,
    positions: bool = True,
    backend: str | None = None,
) -> EMCA:
    """The control: the mean of the allowed pixels instead of a search, all else as in EMCA."""
    return EMCA(**locals(), selection="mean")
