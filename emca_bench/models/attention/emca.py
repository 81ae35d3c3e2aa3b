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
from torch import Tensor, nn

from emca_bench.errors import UsageError, did_you_mean
from emca_bench.models.attention.base import CrossAttention, with_position
from emca_bench.models.attention.prototypes import ChosenPixels, first_pixel_if_empty, gather_mean, mask_or_full, random_pixels

SELECTIONS = ("argmax", "topk_mean", "topk_softmax", "random", "mean", "softmax", "pool_and_prototype")
SELECTION_GRADIENTS = ("none", "straight_through")
TEMPERATURES = ("learned", "per_head", "fixed")
HEAD_SPLITS = ("keys", "features")
ALPHAS = ("learned", "one", "zero")
PRODUCTS = ("projected", "plain")
RESIDUALS = ("projected", "raw")
EMPTY_MASKS = ("everywhere", "first_pixel")
QUERY_INITS = ("xavier", "identity")


class Kept(NamedTuple):
    """What a call chose from, for a loss on the choice."""

    scores_BQMP: Tensor
    """As a softmax takes them, up to a constant per query and head."""
    allowed_BQP: Tensor | None
    shape: tuple[int, int]


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

    Gradients flow through the gathered rows only; none through scores, choice or mask. `selection="softmax"` and
    `selection_gradient="straight_through"` are the members of the family whose selection is trained.

    Args:
        width: model width C, and key width D.
        heads: each head chooses its own pixel; the slices are concatenated.
        prototypes: K pixels per query and head, 1 <= K <= P. Only for topk_* and random.
        selection: "argmax"; "topk_mean" and "topk_softmax" average the K best; "random" takes random allowed pixels; "mean" and
            "softmax" weigh all allowed pixels (mask pooling, soft prototypes); "pool_and_prototype" is the mean of mean and argmax.
        selection_gradient: "straight_through" gives a choice of one pixel the gradient that a softmax of the scores would have; results
            are those of "none".
        temperature: of that softmax: "learned", one for all heads; "per_head", learned; "fixed".
        temperature_start: what it is at first, in multiples of attention's sqrt(D / heads).
        head_split: "keys" splits projected keys into heads; "features" splits the features as they come, so that many heads cost what
            one does.
        normalize_keys: 2-norm of keys and queries over all D, before the heads are split.
        local_conv: batch norm and depth-wise 3x3 convolution on the features.
        query_norm: LayerNorm in front of W_Q.
        alpha: "learned", or a constant; "zero" leaves the prototype alone, without any product.
        product: "projected" by W_A, or "plain": the element-wise product as it is.
        norm_axis: "row", "queries" or "none", see `emca_kernels.attend_prototypes`.
        residual: "projected" adds the projected query, "raw" the query as it came, without its position.
        positions: whether positional embeddings are added to features and queries.
        empty_mask: "everywhere" per query, as Mask2Former; "first_pixel" is PEM's: pixel 0 unless all queries of the image are empty.
        folded: score raw features with folded queries (exact rewrite R1). None folds where that is cheaper and possible.
        query_init: "xavier", or "identity" so that a projected residual starts as the raw one.
        backend: of its operators, for measurements; None takes the fastest that serves a call.

    Attributes:
        keeps_scores: whether a call leaves in `kept` what it chose from; costs nothing where it is off.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int = 1,
        prototypes: int = 1,
        selection: str = "argmax",
        selection_gradient: str = "none",
        temperature: str = "learned",
        temperature_start: float = 1.0,
        head_split: str = "keys",
        normalize_keys: bool = False,
        local_conv: bool = False,
        query_norm: bool = False,
        alpha: str = "learned",
        product: str = "projected",
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
            ("selection_gradient", selection_gradient, SELECTION_GRADIENTS),
            ("temperature", temperature, TEMPERATURES),
            ("head_split", head_split, HEAD_SPLITS),
            ("alpha", alpha, ALPHAS),
            ("product", product, PRODUCTS),
            ("norm_axis", norm_axis, NORM_AXES),
            ("residual", residual, RESIDUALS),
            ("empty_mask", empty_mask, EMPTY_MASKS),
            ("query_init", query_init, QUERY_INITS),
        ):
            if found not in known:
                raise UsageError(f"{switch}={found!r}{did_you_mean(str(found), known)}; expected one of {', '.join(known)}")
        if heads < 1 or width % heads:
            raise UsageError(f"heads={heads} must divide the model width {width}")
        self.width, self.heads, self.prototypes, self.selection = width, heads, prototypes, selection
        self.selection_gradient, self.head_split = selection_gradient, head_split
        self.normalize_keys, self.norm_axis, self.residual = normalize_keys, norm_axis, residual
        self.positions, self.empty_mask = positions, empty_mask
        self.folded, self.normalises_queries, self.backend = folded, query_norm, backend
        self._check_together(alpha)
        self._check_temperature(temperature, temperature_start)
        self.tail_backend = backend if backend in known_backends("attend_prototypes") else None
        self.local_conv = LocalConv(width) if local_conv else None
        self.query_norm = nn.LayerNorm(width) if query_norm else None
        self.key_projection = nn.Linear(width, width)
        self.query_projection = nn.Linear(width, width)
        self.product_projection = nn.Linear(width, width) if product == "projected" and alpha != "zero" else None
        self.out_projection = nn.Linear(width, width)
        self.alpha = _number(torch.ones(width), learned=alpha == "learned") if alpha != "zero" else None
        if self._is_trained():
            first = torch.full((heads,) if temperature == "per_head" else (), -math.log(temperature_start * math.sqrt(width // heads)))
            self.log_scale = _number(first, learned=temperature != "fixed")
        self.keeps_scores = False
        self.kept: Kept | None = None
        self._reset_parameters(query_init)

    def _check_together(self, alpha: str) -> None:
        """Complain about values that are known but do not go together."""
        selection, backend = self.selection, self.backend
        served = known_backends("pool_prototypes" if selection in ("mean", "softmax") else "select_prototypes")
        if backend is not None and backend not in served:
            raise UsageError(f"backend={backend!r}{did_you_mean(backend, served)}; expected one of {', '.join(served)}")
        if self.prototypes < 1 or (self.prototypes > 1 and selection not in ("topk_mean", "topk_softmax", "random")):
            said = f"prototypes={self.prototypes} with selection={selection!r}"
            raise UsageError(f"{said}: expected 1, or topk_mean, topk_softmax or random")
        if self.empty_mask == "first_pixel" and selection in ("mean", "softmax", "pool_and_prototype"):
            raise UsageError(f"empty_mask='first_pixel' with selection={selection!r}: expected everywhere, a pool has no first pixel")
        if self.selection_gradient != "none" and selection not in ("argmax", "pool_and_prototype"):
            said = f"selection_gradient={self.selection_gradient!r} with selection={selection!r}"
            raise UsageError(f"{said}: expected none, or argmax or pool_and_prototype")
        if self.selection_gradient != "none" and self.empty_mask == "first_pixel":
            raise UsageError(f"selection_gradient={self.selection_gradient!r} with empty_mask='first_pixel': expected everywhere")
        if self.folded and self.normalize_keys:
            raise UsageError("folded=true needs normalize_keys=false: a norm per key cannot be folded into the query")
        if self.head_split == "features" and (self.normalize_keys or self.folded is False):
            raise UsageError("head_split='features' needs normalize_keys=false and no folded=false: its heads never see projected keys")
        if alpha == "zero" and self.residual == "raw" and not self._is_trained():
            raise UsageError(
                f"alpha='zero' with residual='raw' and selection={selection!r}: nothing would train W_Q; expected another of the three"
            )

    def _check_temperature(self, temperature: str, start: float) -> None:
        if not start > 0:
            raise UsageError(f"temperature_start={start}; expected more than 0")
        if (temperature, start) != ("learned", 1.0) and not self._is_trained():
            said = f"temperature={temperature!r} from {start} with selection={self.selection!r}"
            raise UsageError(f"{said}: expected softmax, or selection_gradient='straight_through'; nothing else has a temperature")

    def _reset_parameters(self, query_init: str) -> None:
        for projection in (self.key_projection, self.query_projection, self.product_projection, self.out_projection):
            if projection is not None:
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
        source_BPC, position_BPC = self._source(features, feature_pos, shape)
        if self.keeps_scores:
            scores_BQMP = self._scores(with_position(source_BPC, position_BPC), self._compared(queries, query_pos)[1])
            self.kept = Kept(scores_BQMP, allowed, shape)
        if self._is_one_operator(features.shape[1], queries.shape[1]):
            return self._attend_at_once(queries, query_pos if self.positions else None, source_BPC, position_BPC, allowed)
        projected_BQD, compared_BQD = self._compared(queries, query_pos)
        given = (source_BPC, position_BPC, compared_BQD, allowed)
        if self._needs_soft_gradient():
            with torch.no_grad():
                chosen_BQD = self._prototypes(*given, soft=False)
            soft_BQD = self._prototypes(*given, soft=True)
            prototypes_BQD = soft_BQD + (chosen_BQD - soft_BQD).detach()
        else:
            prototypes_BQD = self._prototypes(*given, soft=self.selection == "softmax")
        update = self._attend(prototypes_BQD, compared_BQD)
        return update + (projected_BQD if self.residual == "projected" else queries)

    def _source(self, features: Tensor, feature_pos: Tensor | None, shape: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """What is scored, in two summands."""
        position_BPC = feature_pos if self.positions else None
        if self.local_conv is None:
            return features, position_BPC
        return self.local_conv(with_position(features, position_BPC), shape), None

    def _compared(self, queries: Tensor, query_pos: Tensor | None) -> tuple[Tensor, Tensor]:
        """Projected queries, and what of them is compared with the keys."""
        located = with_position(queries, query_pos) if self.positions else queries
        projected_BQD = self.query_projection(located if self.query_norm is None else self.query_norm(located))
        return projected_BQD, F.normalize(projected_BQD, dim=-1) if self.normalize_keys else projected_BQD

    def _attend(self, prototypes_BQD: Tensor, compared_BQD: Tensor) -> Tensor:
        """The element-wise tail, residual not included."""
        if self.alpha is None:
            return self.out_projection(prototypes_BQD)
        product = self.product_projection
        return attend_prototypes(
            prototypes_BQD,
            compared_BQD,
            None if product is None else product.weight,
            None if product is None else product.bias,
            self.alpha,
            self.out_projection.weight,
            self.out_projection.bias,
            norm_axis=self.norm_axis,
            backend=self.tail_backend,
        )

    def _is_one_operator(self, pixels: int, queries: int) -> bool:
        """Whether `emca_attention` is this very layer."""
        choice = self.heads == self.prototypes == 1 and self.empty_mask == "everywhere" and not self._needs_soft_gradient()
        tail = self.alpha is not None and self.product_projection is not None and self.norm_axis == "row"
        served = self.backend is None or self.backend in known_backends("emca_attention")
        if not (choice and tail and served and self.query_norm is None):
            return False
        return self.selection in SELECTIONS_AT_ONCE and self._folds(pixels, queries)

    def _attend_at_once(
        self, queries: Tensor, query_pos: Tensor | None, source_BPC: Tensor, position_BPC: Tensor | None, allowed: Tensor | None
    ) -> Tensor:
        assert self.product_projection is not None
        assert self.alpha is not None
        return emca_attention(
            source_BPC,
            queries,
            mask_or_full(allowed, source_BPC, queries) if self.selection == "mean" else allowed,
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
            scale=self.log_scale.exp().reshape(()) if self.selection == "softmax" else None,
            selection=self.selection,
            residual=self.residual,
            backend=self.backend,
        )

    def keys(self, source_BPC: Tensor) -> Tensor:
        """Projected and, where the switch says so, normalised keys [B, P, D]."""
        keys_BPD = self.key_projection(source_BPC)
        return F.normalize(keys_BPD, dim=-1) if self.normalize_keys else keys_BPD

    def scores(
        self, queries: Tensor, query_pos: Tensor | None, features: Tensor, feature_pos: Tensor | None, *, shape: tuple[int, int]
    ) -> Tensor:
        """What the choice is made by, in plain torch: arguments as of `forward`.

        Returns:
            [B, Q, M, P], at the temperature of a softmax, up to a constant per query and head.
        """
        source_BPC, position_BPC = self._source(features, feature_pos, shape)
        return self._scores(with_position(source_BPC, position_BPC), self._compared(queries, query_pos)[1])

    def _scores(self, source_BPC: Tensor, compared_BQD: Tensor) -> Tensor:
        if self.head_split == "features":
            rows, asked = source_BPC, compared_BQD @ self.key_projection.weight
        else:
            rows, asked = self.keys(source_BPC), compared_BQD
        asked_BMQd, rows_BMPd = (tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2) for tokens in (asked, rows))
        scale = self.log_scale.exp().view(-1, 1, 1) if self._is_trained() else (self.width // self.heads) ** -0.5
        return (asked_BMQd @ rows_BMPd.mT * scale).transpose(1, 2)

    def _is_trained(self) -> bool:
        """Whether a softmax over all allowed pixels trains the selection."""
        return self.selection == "softmax" or self.selection_gradient == "straight_through"

    def _needs_soft_gradient(self) -> bool:
        return self.selection_gradient == "straight_through" and torch.is_grad_enabled()

    def _folds(self, pixels: int, queries: int) -> bool:
        if self.head_split == "features":
            return True
        if self.folded is not None:
            return self.folded
        if self.normalize_keys:
            return False
        return self._macs(pixels, queries, folded=True) < self._macs(pixels, queries, folded=False)

    def _prototypes(
        self, source_BPC: Tensor, position_BPC: Tensor | None, queries_BQD: Tensor, allowed: Tensor | None, *, soft: bool
    ) -> Tensor:
        """Prototypes [B, Q, D]: rows of projected keys, or rows of features that are projected after they are gathered."""
        folds = self._folds(source_BPC.shape[1], queries_BQD.shape[1])
        find = self._soft_rows if soft else self._chosen_rows
        if not folds:
            source_BPC, position_BPC = self.keys(with_position(source_BPC, position_BPC)), None
        mean_BQC = None
        if self.selection in ("mean", "pool_and_prototype"):
            full = mask_or_full(allowed, source_BPC, queries_BQD)
            mean_BQC = pool_prototypes(source_BPC, None, full, position=position_BPC, backend=self.backend).flatten(2)
        if self.selection == "mean":
            assert mean_BQC is not None
            return self.key_projection(mean_BQC) if folds else mean_BQC
        if folds and self.heads > 1 and self.head_split == "keys":
            folded_BQMC = self._fold_heads(queries_BQD)
            per_head = None if allowed is None else allowed.repeat_interleave(self.heads, dim=1)
            rows_BQMC = find(source_BPC, position_BPC, folded_BQMC.flatten(1, 2), per_head, heads=1).view_as(folded_BQMC)
            return self._project_heads(_halfway(rows_BQMC, mean_BQC))
        asked_BQC = queries_BQD @ self.key_projection.weight if folds else queries_BQD
        rows_BQC = _halfway(find(source_BPC, position_BPC, asked_BQC, allowed, heads=self.heads), mean_BQC).flatten(2)
        return self.key_projection(rows_BQC) if folds else rows_BQC

    def _chosen_rows(
        self, source_BPC: Tensor, position_BPC: Tensor | None, asked_BQC: Tensor, allowed: Tensor | None, *, heads: int
    ) -> Tensor:
        """Rows [B, Q, heads, C / heads] of the chosen pixels."""
        chosen = self._choose(source_BPC, asked_BQC, allowed, heads=heads, position=position_BPC)
        rows_BQMd = gather_mean(source_BPC, chosen)
        return rows_BQMd if position_BPC is None else rows_BQMd + gather_mean(position_BPC.expand_as(source_BPC), chosen)

    def _soft_rows(
        self, source_BPC: Tensor, position_BPC: Tensor | None, asked_BQC: Tensor, allowed: Tensor | None, *, heads: int
    ) -> Tensor:
        """The same of all allowed pixels, weighted by a softmax."""
        scale = self.log_scale.exp()
        if scale.dim():
            # a head is a slice of the channels, or a query of its own
            by_head = asked_BQC.unflatten(-1, (heads, -1)) if heads == self.heads else asked_BQC.unflatten(1, (-1, self.heads))
            asked_BQC = (by_head * scale[:, None]).reshape(asked_BQC.shape)
        else:
            asked_BQC = asked_BQC * scale
        return pool_prototypes(source_BPC, asked_BQC, allowed, heads=heads, position=position_BPC, backend=self.backend)

    def _fold_heads(self, queries_BQD: Tensor) -> Tensor:
        """W_K taken to the side of the queries, [B, Q, M, C]: each head is a query of its own."""
        weight_MdC = self.key_projection.weight.unflatten(0, (self.heads, -1))
        return torch.einsum("bqmd,mdc->bqmc", queries_BQD.unflatten(-1, (self.heads, -1)), weight_MdC)

    def _project_heads(self, rows_BQMC: Tensor) -> Tensor:
        """Keys [B, Q, D] of a row per head, each head's own slice."""
        weight_MdC = self.key_projection.weight.unflatten(0, (self.heads, -1))
        return torch.einsum("bqmc,mdc->bqmd", rows_BQMC, weight_MdC).flatten(2) + self.key_projection.bias

    @torch.no_grad()
    def _choose(
        self, features: Tensor, queries: Tensor, allowed: Tensor | None, *, heads: int, position: Tensor | None = None
    ) -> ChosenPixels:
        if self.selection == "random":
            indices, scores = random_pixels(mask_or_full(allowed, features, queries), heads=heads, count=self.prototypes)
        else:
            options: dict[str, Any] = {"k": self.prototypes, "heads": heads, "position": position, "backend": self.backend}
            indices, scores = select_prototypes(features, queries, allowed, **options)
        if self.empty_mask == "first_pixel" and allowed is not None:
            indices = first_pixel_if_empty(indices, allowed)
        return ChosenPixels(indices, self._weights(scores.to(features.dtype)))

    def _weights(self, scores: Tensor) -> Tensor:
        if self.prototypes == 1:
            return scores.new_ones(()).expand_as(scores)
        if self.selection == "topk_softmax":
            return (scores / math.sqrt(self.width // self.heads)).softmax(-1)
        filled = (scores > -torch.inf).to(scores.dtype)
        return filled / filled.sum(-1, keepdim=True)

    def macs(self, *, pixels: int, queries: int) -> int:
        """See `CrossAttention.macs`; of a call without gradients."""
        return self._macs(pixels, queries, folded=self._folds(pixels, queries))

    def _macs(self, pixels: int, queries: int, *, folded: bool) -> int:
        """Keys, scores and pooling, local convolution; then the projections Q, A and out, and folding in and out.

        Folded, each head of projected keys scores and pools all channels.
        """
        searches = {"random": 0, "mean": 0, "softmax": 2}.get(self.selection, 1)
        heads = self.heads if folded and self.head_split == "keys" else 1
        passes = searches * heads + (self.selection in ("mean", "pool_and_prototype"))
        keys = 0 if folded else self.width**2
        local = 0 if self.local_conv is None else 9 * self.width
        projections = 2 + (self.product_projection is not None) + (0 if not folded else 1 if self.selection == "mean" else 2)
        return pixels * (passes * queries * self.width + keys + local) + projections * queries * self.width**2


def _number(value: Tensor, *, learned: bool) -> Tensor:
    """A parameter, or a constant that moves with the module and is in no checkpoint."""
    return nn.Parameter(value) if learned else nn.Buffer(value, persistent=False)


def _halfway(rows_BQMd: Tensor, mean_BQC: Tensor | None) -> Tensor:
    """Rows as they are, or halfway to the mean, of which each head has its slice or all."""
    if mean_BQC is None:
        return rows_BQMd
    whole = rows_BQMd.shape[-1] == mean_BQC.shape[-1]
    return (rows_BQMd + (mean_BQC[:, :, None] if whole else mean_BQC.unflatten(-1, (rows_BQMd.shape[2], -1)))) / 2
