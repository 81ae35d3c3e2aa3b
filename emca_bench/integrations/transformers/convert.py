"""Our model with the weights of Hugging Face's, and the other way round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Mask2FormerForUniversalSegmentation

from emca_bench.errors import UsageError
from emca_bench.integrations.transformers.config import check_config, make_attention, make_backbone, make_config
from emca_bench.integrations.transformers.drop_in import place_attentions
from emca_bench.models.checkpoints.files import CheckpointError
from emca_bench.models.checkpoints.load import load_tensors
from emca_bench.models.checkpoints.names import Recognised, to_original_names, to_transformers_names
from emca_bench.models.mask2former import Mask2Former
from emca_bench.models.mask_decoder import MaskDecoder
from emca_bench.models.pixel_decoders.msdeform import MSDeformAttnPixelDecoder

ATTENTION = ".multihead_attn."
HF_ONLY = ("criterion.empty_weight", "swin.layernorm.weight", "swin.layernorm.bias")
"""Ends of names of Hugging Face's model that ours has no tensor for: the loss's class weights, and a norm that nothing reads."""


def from_transformers(
    hf_model: nn.Module,
    *,
    attention: str = "masked",
    attention_switches: Mapping[str, Any] | None = None,
    norm: str = "frozen",
    mask_source: str = "logits",
    image_processor: Any = None,
) -> Mask2Former:
    """Our Mask2Former with the sizes and weights of Hugging Face's; on its device, in its dtype and mode.

    Weights are copied; all of them are used, or it is an error. With another attention than the one that the Hugging Face model has,
    the cross-attentions start fresh.

    Args:
        hf_model: a `Mask2FormerForUniversalSegmentation` with a ResNet or Swin backbone.
        attention, attention_switches: of our model; "masked" is the one whose weights such models hold.
        norm: of a ResNet: "frozen" keeps statistics and affine as constants, as the published models do; "batch" trains them, as
            Hugging Face's model does.
        mask_source: see `MaskDecoder`.
        image_processor: whose `image_mean`, `image_std` and `rescale_factor` normalise the images; None: ImageNet's, the
            processor's default.

    Returns:
        A model that takes RGB images in 0..255 (see `Mask2Former.forward`), not `pixel_values`.

    Raises:
        UsageError: another model or backbone, or settings that the published Mask2Former does not have.
    """
    if not isinstance(hf_model, Mask2FormerForUniversalSegmentation):
        raise UsageError(f"a {type(hf_model).__name__}; expected a Mask2FormerForUniversalSegmentation of transformers")
    check_config(hf_model.config)
    like = hf_model.class_predictor.weight
    model = _build(hf_model.config, attention, attention_switches or {}, norm, mask_source).to(like.device, like.dtype)
    if image_processor is not None:
        _take_statistics(model, image_processor)
    _copy_weights(to_original_names(hf_model.state_dict()), model)
    return model.train(hf_model.training)


def _build(config: Any, attention: str, switches: Mapping[str, Any], norm: str, mask_source: str) -> Mask2Former:
    width, heads = config.hidden_dim, config.num_attention_heads
    backbone = make_backbone(config.backbone_config, norm=norm)
    return Mask2Former(
        backbone=backbone,
        pixel_decoder=MSDeformAttnPixelDecoder(
            channels=backbone.channels,
            width=width,
            layers=config.encoder_layers,
            heads=heads,
            feedforward=config.encoder_feedforward_dim,
        ),
        predictor=MaskDecoder(
            attention=lambda: make_attention(config, attention, switches),
            width=width,
            classes=config.num_labels,
            queries=config.num_queries,
            layers=config.decoder_layers - 1,
            heads=heads,
            feedforward=config.dim_feedforward,
            mask_source=mask_source,
        ),
    )


def _take_statistics(model: Mask2Former, image_processor: Any) -> None:
    """A processor computes (x * factor - mean) / std, each step only where it is switched on."""
    factor = image_processor.rescale_factor if getattr(image_processor, "do_rescale", True) else 1.0
    normalises = getattr(image_processor, "do_normalize", True)
    mean = torch.tensor(image_processor.image_mean if normalises else [0.0] * 3)
    std = torch.tensor(image_processor.image_std if normalises else [1.0] * 3)
    model.pixel_mean.copy_((mean / factor).view(3, 1, 1))
    model.pixel_std.copy_((std / factor).view(3, 1, 1))


def _copy_weights(checkpoint: Recognised, model: Mask2Former) -> None:
    report = load_tensors(model, checkpoint, source="the Hugging Face model", strict=False)
    strays = [*report.missing, *report.unexpected, *(name for name, _, _ in report.misshaped)]
    attention_loaded = any(ATTENTION in name for name in report.loaded)
    if any(attention_loaded or ATTENTION not in name for name in strays):
        raise CheckpointError(f"the weights do not fit\n{report}")


def to_transformers(model: Mask2Former) -> Mask2FormerForUniversalSegmentation:
    """Hugging Face's Mask2Former with the sizes and weights of ours; on its device, in its dtype and mode.

    A model with another attention than masked cross-attention becomes a Hugging Face model with that attention inside, as
    `replace_cross_attention` makes it. Its `pixel_values` are `(images - model.pixel_mean) / model.pixel_std`, padded to multiples of 32.

    Args:
        model: with a ResNet (batch norms) or Swin backbone and the pixel decoder msdeform. Weights are copied.

    Raises:
        UsageError: a backbone or pixel decoder that Hugging Face's Mask2Former has not.
    """
    if not isinstance(model, Mask2Former):
        raise UsageError(f"a {type(model).__name__}; expected a Mask2Former of emca_bench.models")
    hf_model = Mask2FormerForUniversalSegmentation(make_config(model))
    like = model.sem_seg_head.predictor.class_embed.weight
    hf_model.to(device=like.device, dtype=like.dtype)  # type: ignore[call-arg]
    layers: Any = model.sem_seg_head.predictor.transformer_cross_attention_layers
    place_attentions(hf_model, [layer.multihead_attn for layer in layers])
    weights = to_transformers_names(model.state_dict())
    missing, unexpected = hf_model.load_state_dict(weights, strict=False)
    strays = [name for name in missing if not name.endswith(HF_ONLY)] + unexpected
    if strays:
        raise CheckpointError(f"{len(strays)} tensors do not fit between the models: {', '.join(strays[:5])}")
    return hf_model.train(model.training)
