"""Any registered attention inside Hugging Face's own Mask2Former, in place of its cross-attention.

Its decoder layer calls `cross_attn` with positions already added, adds the residual itself, and gets a mask in which the decoder has
opened the rows of queries with an empty mask. Our attentions want queries and positions apart, include the residual, have their own
rule for empty masks, and want to know the map's size. So, without a line of the layer written again:

- the mask predictor gives the mask as a map [B, Q, h, w + 1] whose last column is open: no row of it is ever blocked as a whole, so
  that the decoder's own rule leaves it alone, and it carries its size;
- the layer hands what it was called with to the attention, inside of what gradient checkpointing calls again;
- a hook in front of the attention puts that in the place of the layer's arguments, and one behind it subtracts the residual that the
  layer will add.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerModel
from transformers.models.mask2former.modeling_mask2former import Mask2FormerMaskedAttentionDecoderLayer, Mask2FormerMaskPredictor

from emca_bench.errors import UsageError
from emca_bench.integrations.transformers.config import check_config, make_attention
from emca_bench.models.attention.masked import MaskedCrossAttention


class Inputs(NamedTuple):
    """What a decoder layer was called with, batch first."""

    queries_BQC: Tensor
    query_pos_BQC: Tensor
    features_BPC: Tensor
    feature_pos_BPC: Tensor


def replace_cross_attention(hf_model: nn.Module, attention: str = "emca", **switches: Any) -> nn.Module:
    """Swap the cross-attention of every decoder layer of a Hugging Face Mask2Former, in place.

    From masked cross-attention to "masked" or "masked_fused", and between attentions with the same parameters, the weights are carried
    over; any other attention starts fresh and wants training. Parameters keep their place, `...decoder.layers.0.cross_attn.*`; a
    state dict loads into a model that had the same replacement. `from_pretrained` builds Hugging Face's own attention: load, then replace.

    Args:
        hf_model: a `Mask2FormerForUniversalSegmentation` or `Mask2FormerModel`, any backbone.
        attention: registry name, "emca", "masked_fused", ...
        switches: of the attention, see `build_attention`; heads of masked attentions are the model's.

    Returns:
        The same model.

    Raises:
        UsageError: another model, an unknown attention or switch, or settings of the model that the published Mask2Former does not have.
    """
    decoder = _decoder(hf_model)
    config: Any = hf_model.config
    check_config(config)
    built = [make_attention(config, attention, switches) for _ in decoder.layers]
    for layer, new in zip(decoder.layers, built, strict=True):
        _carry_over(layer.cross_attn, new)
    _seat(decoder, built)
    return hf_model


def place_attentions(hf_model: nn.Module, attentions: Sequence[nn.Module]) -> None:
    """Copies of our modules in the decoder layers, unless they are what Hugging Face has there anyway."""
    if not all(isinstance(attention, MaskedCrossAttention) for attention in attentions):
        _seat(_decoder(hf_model), [copy.deepcopy(attention) for attention in attentions])


def _decoder(hf_model: nn.Module) -> Any:
    if isinstance(hf_model, Mask2FormerForUniversalSegmentation):
        hf_model = hf_model.model
    if not isinstance(hf_model, Mask2FormerModel):
        raise UsageError(f"a {type(hf_model).__name__}; expected a Mask2FormerForUniversalSegmentation or Mask2FormerModel of transformers")
    return hf_model.transformer_module.decoder


def _carry_over(old: nn.Module, new: nn.Module) -> None:
    """Weights where names and shapes are the same; device, dtype and mode always."""
    before, after = old.state_dict(), new.state_dict()
    if {name: tensor.shape for name, tensor in before.items()} == {name: tensor.shape for name, tensor in after.items()}:
        new.load_state_dict(before)
    new.train(old.training)


def _seat(decoder: Any, attentions: Sequence[nn.Module]) -> None:
    like = decoder.layernorm.weight
    # as FSDP does it: the instance keeps its state and gets a class that knows more
    decoder.mask_predictor.__class__ = MapPredictor
    for layer, attention in zip(decoder.layers, attentions, strict=True):
        layer.__class__ = SeatLayer
        attention.register_forward_pre_hook(_call_as_ours, with_kwargs=True)
        attention.register_forward_hook(_without_residual)
        layer.cross_attn = attention.to(like.device, like.dtype)


class MapPredictor(Mask2FormerMaskPredictor):
    """Attention masks as maps with an open last column."""

    def forward(self, outputs: Tensor, pixel_embeddings: Tensor, attention_mask_target_size: Any = None) -> tuple[Tensor, Tensor]:
        """Mask logits, and what is blocked: bool [B, Q, h, w + 1]."""
        mask_logits, blocked = super().forward(outputs, pixel_embeddings, attention_mask_target_size)
        # all heads have the same mask
        blocked_BQP = blocked.unflatten(0, (mask_logits.shape[0], -1))[:, 0]
        return mask_logits, F.pad(blocked_BQP.unflatten(-1, tuple(attention_mask_target_size)), (0, 1), value=False)


class SeatLayer(Mask2FormerMaskedAttentionDecoderLayer):
    """A decoder layer whose attention knows what the layer was called with."""

    def forward_post(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        *,
        level_index: int,
        position_embeddings: Sequence[Tensor],
        query_position_embeddings: Tensor,
        encoder_hidden_states: Sequence[Tensor],
        **others: Any,
    ) -> Any:
        """The layer's own, post-norm; its tensors have the batch in the second place."""
        attention: Any = self.cross_attn
        attention.inputs = Inputs(
            hidden_states.transpose(0, 1),
            query_position_embeddings.transpose(0, 1),
            encoder_hidden_states[level_index].transpose(0, 1),
            position_embeddings[level_index].transpose(0, 1),
        )
        try:
            return super().forward_post(
                hidden_states,
                level_index=level_index,
                position_embeddings=position_embeddings,  # type: ignore[arg-type]
                query_position_embeddings=query_position_embeddings,
                encoder_hidden_states=encoder_hidden_states,  # type: ignore[arg-type]
                **others,
            )
        finally:
            del attention.inputs


def _call_as_ours(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    blocked_BQhw = kwargs["attn_mask"][..., :-1]
    return (*attention.inputs, ~blocked_BQhw.flatten(2)), {"shape": tuple(blocked_BQhw.shape[2:])}


def _without_residual(attention: Any, args: tuple[Any, ...], output: Tensor) -> tuple[Tensor, None]:
    return (output - attention.inputs.queries_BQC).transpose(0, 1), None
