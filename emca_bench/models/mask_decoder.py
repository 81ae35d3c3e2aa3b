"""Mask2Former's transformer decoder with a pluggable cross-attention, under the original's parameter names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from emca_kernels.autocast import autocast_dtype
from torch import Tensor, nn

from emca_bench.errors import UsageError, did_you_mean
from emca_bench.models.attention import CrossAttention
from emca_bench.models.mask_logits import MaskProduct, Masks
from emca_bench.models.pixel_decoders.layers import upsample_to
from emca_bench.models.position import sine_position_like
from emca_bench.models.predictions import Predictions

MASK_SOURCES = ("logits", "features")
MASK_RULES = ("threshold", "winner")

LEVELS = 3
"""Strides 32, 16 and 8."""


class SelfAttention(nn.MultiheadAttention):
    """Multi-head attention of the queries to each other, positions in queries and keys but not in values: no layout is copied."""

    def forward(self, located: Tensor, content: Tensor) -> Tensor:  # type: ignore[override]
        """[B, Q, C] with and without positions to [B, Q, C]."""
        width = self.embed_dim
        weight_qk, weight_v = self.in_proj_weight.split((2 * width, width))
        bias_qk, bias_v = self.in_proj_bias.split((2 * width, width))
        q_BMQd, k_BMQd = self.project(located, weight_qk, bias_qk).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        v_BMQd = self.project(content, weight_v, bias_v).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        attended_BMQd = F.scaled_dot_product_attention(q_BMQd, k_BMQd, v_BMQd)
        return self.out_proj(attended_BMQd.transpose(1, 2).flatten(2))

    project = staticmethod(F.linear)


class SelfAttentionLayer(nn.Module):
    """Queries among themselves; its norm behind, or in front of the attention with `pre_norm`."""

    def __init__(self, width: int, heads: int, *, pre_norm: bool = False) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.self_attn = SelfAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, queries: Tensor, query_pos: Tensor) -> Tensor:
        """[B, Q, C] to the same shape."""
        content = self.norm(queries) if self.pre_norm else queries
        updated = queries + self.self_attn(content + query_pos, content)
        return updated if self.pre_norm else self.norm(updated)


class CrossAttentionLayer(nn.Module):
    """Queries look at one feature level through the attention under study; its norm behind, or in front with `pre_norm`.

    The attention is the child `multihead_attn`, whatever it is: the original's name, so that its checkpoints load. In front of an
    attention that normalises its queries itself there is no norm; to any other the normalised queries are given, and what it adds
    to them is added to the queries as they came.
    """

    def __init__(self, width: int, attention: CrossAttention, *, pre_norm: bool = False) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.multihead_attn = attention
        self.norm = None if pre_norm and attention.normalises_queries else nn.LayerNorm(width)

    def forward(
        self, queries: Tensor, query_pos: Tensor, features: Tensor, feature_pos: Tensor, allowed: Tensor, *, shape: tuple[int, int]
    ) -> Tensor:
        """[B, Q, C] to the same shape; see `CrossAttention.forward`."""
        if self.norm is None:
            return self.multihead_attn(queries, query_pos, features, feature_pos, allowed, shape=shape)
        content = self.norm(queries) if self.pre_norm else queries
        updated = self.multihead_attn(content, query_pos, features, feature_pos, allowed, shape=shape)
        return queries + (updated - content) if self.pre_norm else self.norm(updated)


class FFNLayer(nn.Module):
    """Feed-forward network of each query; its norm behind, or in front with `pre_norm`."""

    def __init__(self, width: int, feedforward: int, *, pre_norm: bool = False) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.linear1 = nn.Linear(width, feedforward)
        self.linear2 = nn.Linear(feedforward, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, queries: Tensor) -> Tensor:
        """[B, Q, C] to the same shape."""
        content = self.norm(queries) if self.pre_norm else queries
        updated = queries + self.linear2(self._hidden(content))
        return updated if self.pre_norm else self.norm(updated)

    def _hidden(self, content: Tensor) -> Tensor:
        return F.relu(self.linear1(content))


class InputProjection(nn.Conv2d):
    """1x1 convolution of one level to the width of the decoder."""

    def __init__(self, source: int, width: int) -> None:
        super().__init__(source, width, 1)
        nn.init.kaiming_uniform_(self.weight, a=1)
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, *, width: int, out: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, out if index == layers - 1 else width) for index in range(layers))

    def forward(self, queries: Tensor) -> Tensor:
        """[B, Q, C] to [B, Q, out]."""
        for layer in self.layers[:-1]:
            queries = F.relu(layer(queries))
        return self.layers[-1](queries)


class Level(NamedTuple):
    """One feature level as the layers read it."""

    features_BPC: Tensor
    position_PC: Tensor
    shape: tuple[int, int]


class MaskDecoder(nn.Module):
    """Learned queries, refined by layers that attend to strides 32, 16 and 8 in turn, to a class and a mask each.

    Source: Cheng et al., Mask2Former, 2022, section 3.2.

    Args:
        attention: makes the cross-attention of a layer, called once a layer.
        width: C; also the width of mask features.
        classes: without "no object".
        queries: Q.
        layers: decoder layers (the original's DEC_LAYERS counts one more).
        heads: of the self-attention.
        feedforward: hidden width.
        pre_norm: layer norms in front of each sub-layer (PEM) instead of behind it.
        pyramid_channels: of the levels; None: C. Others are projected to C first.
        mask_source: where attention masks come from. "logits": mask logits at stride 4, resized, as published. "features": mask
            features resized once a level (exact rewrite R2); masks at stride 4 and classes are then computed only where they are
            returned (R5), and with auxiliary predictions, for losses, only where they are read.
        mask_rule: which pixels a query may attend to. "threshold": those of its mask, as published. "winner": those where its
            mask logit is the greatest of all queries, the assignment of kMaX-DeepLab (Yu et al., ECCV 2022); a tie is the first query's.
            A query that wins nothing has an empty mask.
    """

    def __init__(
        self,
        *,
        attention: Callable[[], CrossAttention],
        width: int,
        classes: int,
        queries: int,
        layers: int,
        heads: int,
        feedforward: int,
        pre_norm: bool = False,
        pyramid_channels: int | None = None,
        mask_source: str = "logits",
        mask_rule: str = "threshold",
    ) -> None:
        super().__init__()
        for number, found, known in (("mask_source", mask_source, MASK_SOURCES), ("mask_rule", mask_rule, MASK_RULES)):
            if found not in known:
                raise UsageError(f"{number}={found!r}{did_you_mean(found, known)}; expected one of {', '.join(known)}")
        self.mask_source, self.mask_rule = mask_source, mask_rule
        self.width = width
        self.transformer_self_attention_layers = nn.ModuleList(SelfAttentionLayer(width, heads, pre_norm=pre_norm) for _ in range(layers))
        self.transformer_ffn_layers = nn.ModuleList(FFNLayer(width, feedforward, pre_norm=pre_norm) for _ in range(layers))
        self.decoder_norm = nn.LayerNorm(width)
        self.query_feat = nn.Embedding(queries, width)
        self.query_embed = nn.Embedding(queries, width)
        self.level_embed = nn.Embedding(LEVELS, width)
        channels = width if pyramid_channels is None else pyramid_channels
        self.input_proj = nn.ModuleList(InputProjection(channels, width) for _ in range(LEVELS if channels != width else 0))
        self.class_embed = nn.Linear(width, classes + 1)
        self.mask_embed = MLP(width=width, out=width, layers=3)
        for stack in (self.transformer_self_attention_layers, self.transformer_ffn_layers):
            for parameter in stack.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        # last, so that all other parameters start the same whatever the attention draws
        self.transformer_cross_attention_layers = nn.ModuleList(
            CrossAttentionLayer(width, attention(), pre_norm=pre_norm) for _ in range(layers)
        )

    def forward(
        self, mask_features: Tensor, pyramid: Sequence[Tensor], *, image_size: tuple[int, int], auxiliary: bool | None = None
    ) -> Predictions:
        """Predict from pixel features.

        Args:
            mask_features: [B, C, H / 4, W / 4].
            pyramid: [B, pyramid_channels, h, w] at strides 32, 16, 8.
            image_size: (H, W) before padding, handed through.
            auxiliary: whether earlier predictions are returned, for deep supervision; None: in training mode.
        """
        auxiliary = self.training if auxiliary is None else auxiliary
        if self.input_proj:
            pyramid = [projection(features) for projection, features in zip(self.input_proj, pyramid, strict=True)]
        levels = [self._level(features, embed) for features, embed in zip(pyramid, self.level_embed.weight, strict=True)]
        resized = (
            [upsample_to(mask_features.detach(), features).flatten(2).mT for features in pyramid]
            if self.mask_source == "features"
            else None
        )
        batch = mask_features.shape[0]
        queries = self.query_feat.weight.expand(batch, -1, -1)
        query_pos = self.query_embed.weight.expand(batch, -1, -1)

        lazy = auxiliary and resized is not None
        if lazy:
            # once: under autocast the product would cast them at each call
            mask_features = mask_features.to(autocast_dtype(mask_features) or mask_features.dtype)
        earlier = []
        for index, (cross, among, ffn) in enumerate(
            zip(
                self.transformer_cross_attention_layers,
                self.transformer_self_attention_layers,
                self.transformer_ffn_layers,
                strict=True,
            )
        ):
            level = levels[index % len(levels)]
            normed, embedding = self._embed(queries)
            prediction = None
            if auxiliary or resized is None:
                prediction = Predictions(self.class_embed(normed), self._masks(embedding, mask_features, lazy=lazy), image_size)
            if auxiliary and prediction is not None:
                earlier.append(prediction)
            if resized is None:
                assert prediction is not None
                allowed = self._allowed_from_logits(prediction.mask_logits, level.shape)
            else:
                allowed = self._allowed_from_features(embedding, resized[index % len(levels)])
            queries = cross(queries, query_pos, level.features_BPC, level.position_PC, allowed, shape=level.shape)
            queries = ffn(among(queries, query_pos))
        normed, embedding = self._embed(queries)
        masks = self._masks(embedding, mask_features, lazy=lazy)
        return Predictions(self.class_embed(normed), masks, image_size, tuple(earlier))

    def _level(self, features: Tensor, embed_C: Tensor) -> Level:
        shape = (int(features.shape[-2]), int(features.shape[-1]))
        # rows of a pixel together, once: each level is read by every third layer, and maps [B, C, h, w] would be turned in each
        features_BPC = (features.flatten(2).mT + embed_C).contiguous()
        return Level(features_BPC, sine_position_like(shape, features_BPC), shape)

    def _embed(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """What classes are read from, and mask embeddings."""
        normed = self.decoder_norm(queries)
        return normed, self.mask_embed(normed)

    def _masks(self, embedding_BQE: Tensor, mask_features: Tensor, *, lazy: bool) -> Masks:
        if lazy and embedding_BQE.shape[-1] == mask_features.shape[1]:
            return MaskProduct(embedding_BQE, mask_features)
        logits_BQP = self._mask_logits(embedding_BQE, mask_features.flatten(2).mT)
        return logits_BQP.unflatten(-1, mask_features.shape[-2:])

    def _mask_logits(self, embedding_BQE: Tensor, features_BPE: Tensor) -> Tensor:
        """Products [B, Q, P]; an embedding that is one number longer than the features ends with what is added to them."""
        width = features_BPE.shape[-1]
        logits_BQP = self.score(embedding_BQE[..., :width], features_BPE)
        return logits_BQP if embedding_BQE.shape[-1] == width else logits_BQP + embedding_BQE[..., width:]

    @staticmethod
    def score(embedding_BQE: Tensor, features_BPE: Tensor) -> Tensor:
        """Dot products [B, Q, P]."""
        return embedding_BQE @ features_BPE.mT

    @torch.no_grad()
    def _allowed_from_logits(self, mask_logits: Tensor, shape: tuple[int, int]) -> Tensor:
        resized = F.interpolate(mask_logits, size=shape, mode="bilinear", align_corners=False)
        if self.mask_rule == "winner":
            return _winners(resized.flatten(2))
        return resized.flatten(2).sigmoid() >= 0.5

    @torch.no_grad()
    def _allowed_from_features(self, embedding_BQE: Tensor, resized_BPE: Tensor) -> Tensor:
        logits_BQP = self._mask_logits(embedding_BQE, resized_BPE)
        return _winners(logits_BQP) if self.mask_rule == "winner" else logits_BQP >= 0


def _winners(logits_BQP: Tensor) -> Tensor:
    """Where a query has the greatest logit."""
    # by index: a compiler may round logits anew for each comparison
    return logits_BQP.argmax(1, keepdim=True) == torch.arange(logits_BQP.shape[1], device=logits_BQP.device)[:, None]
