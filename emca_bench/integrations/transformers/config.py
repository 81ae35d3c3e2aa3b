"""Sizes of a model: a Hugging Face configuration to our parts, and our parts to a configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import Mask2FormerConfig, ResNetConfig, SwinConfig

from emca_bench.errors import UsageError
from emca_bench.models.attention import CrossAttention, build_attention
from emca_bench.models.attention.masked import MaskedCrossAttention
from emca_bench.models.backbones import LEVELS, Backbone
from emca_bench.models.backbones.resnet import Block, Conv2d, ResNet
from emca_bench.models.backbones.swin import SwinTransformer
from emca_bench.models.mask2former import Mask2Former
from emca_bench.models.pixel_decoders.msdeform import MSDeformAttnPixelDecoder

MASKED = ("masked", "masked_fused")
"""Attentions with the weights that a Hugging Face model has, and so its heads."""
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def check_config(config: Any) -> None:
    """Refuse what our Mask2Former, and the published one, does not have.

    Raises:
        UsageError: a setting that would make another function.
    """
    width = config.hidden_dim
    _expect(
        "Mask2FormerConfig",
        [
            ("feature_size", config.feature_size, width),
            ("mask_feature_size", config.mask_feature_size, width),
            ("enforce_input_projection", config.enforce_input_projection, False),
            ("pre_norm", config.pre_norm, False),
            ("activation_function", config.activation_function, "relu"),
            ("dropout", config.dropout, 0),
            ("common_stride", config.common_stride, 4),
            ("feature_strides", list(config.feature_strides), [4, 8, 16, 32]),
        ],
    )


def _expect(name: str, settings: Iterable[tuple[str, Any, Any]]) -> None:
    for setting, found, expected in settings:
        if found != expected:
            raise UsageError(f"{name} has {setting}={found!r}; expected {expected!r}, as the published Mask2Former has it")


def make_attention(config: Any, name: str, switches: Mapping[str, Any]) -> CrossAttention:
    """An attention of the configuration's width; the masked ones have its heads."""
    heads = {"heads": config.num_attention_heads} if name in MASKED else {}
    return build_attention(name, width=config.hidden_dim, **(heads | dict(switches)))


def make_backbone(config: Any, *, norm: str) -> Backbone:
    """The backbone of a Hugging Face configuration, with random weights.

    Raises:
        UsageError: neither a ResNet nor a Swin, or one with other settings than the published backbones.
    """
    if isinstance(config, ResNetConfig):
        return _resnet(config, norm)
    if isinstance(config, SwinConfig):
        return _swin(config)
    raise UsageError(
        f"backbone {getattr(config, 'model_type', type(config).__name__)!r} of the Hugging Face model; expected resnet or swin"
    )


def _resnet(config: Any, norm: str) -> ResNet:
    bottleneck = config.layer_type == "bottleneck"
    widths = [config.embedding_size * 2**stage * (4 if bottleneck else 1) for stage in range(len(STAGES))]
    _expect(
        "ResNetConfig",
        [
            ("hidden_sizes", list(config.hidden_sizes), widths),
            ("out_features", list(config.out_features), STAGES),
            ("hidden_act", config.hidden_act, "relu"),
            ("num_channels", config.num_channels, 3),
            ("downsample_in_first_stage", config.downsample_in_first_stage, False),
            ("downsample_in_bottleneck", config.downsample_in_bottleneck, False),
        ],
    )
    first, second, third, fourth = config.depths
    return ResNet(blocks=(first, second, third, fourth), stem_width=config.embedding_size, bottleneck=bottleneck, norm=norm)


def _swin(config: Any) -> SwinTransformer:
    _expect(
        "SwinConfig",
        [
            ("out_features", list(config.out_features), STAGES),
            ("patch_size", config.patch_size, 4),
            ("num_channels", config.num_channels, 3),
            ("mlp_ratio", config.mlp_ratio, 4),
            ("qkv_bias", config.qkv_bias, True),
            ("hidden_act", config.hidden_act, "gelu"),
            ("hidden_dropout_prob", config.hidden_dropout_prob, 0),
            ("attention_probs_dropout_prob", config.attention_probs_dropout_prob, 0),
            ("use_absolute_embeddings", config.use_absolute_embeddings, False),
            ("layer_norm_eps", config.layer_norm_eps, 1e-5),
        ],
    )
    return SwinTransformer(
        embed_dim=config.embed_dim,
        depths=tuple(config.depths),
        num_heads=tuple(config.num_heads),
        window_size=config.window_size,
        drop_path_rate=config.drop_path_rate,
    )


def make_config(model: Mask2Former) -> Mask2FormerConfig:
    """The Hugging Face configuration of our model.

    Raises:
        UsageError: a backbone or pixel decoder that Hugging Face's Mask2Former has not, or heads that differ between its parts.
    """
    pixel_decoder: nn.Module = model.sem_seg_head.pixel_decoder
    predictor: Any = model.sem_seg_head.predictor
    if not isinstance(pixel_decoder, MSDeformAttnPixelDecoder):
        raise UsageError(
            f"pixel decoder {type(pixel_decoder).__name__}; Hugging Face's Mask2Former has MSDeformAttnPixelDecoder (msdeform) alone"
        )
    if predictor.transformer_ffn_layers[0].pre_norm:
        raise UsageError("a mask decoder with pre_norm=True; Hugging Face's Mask2Former is converted with pre_norm=False alone")
    if predictor.mask_rule != "threshold":
        raise UsageError(f"a mask decoder with mask_rule={predictor.mask_rule!r}; Hugging Face's Mask2Former has threshold alone")
    encoder: Any = pixel_decoder.transformer.encoder.layers
    heads = {layer.self_attn.num_heads for layer in predictor.transformer_self_attention_layers}
    heads |= {layer.self_attn.heads for layer in encoder}
    attentions = [layer.multihead_attn for layer in predictor.transformer_cross_attention_layers]
    heads |= {attention.num_heads for attention in attentions if isinstance(attention, MaskedCrossAttention)}
    if len(heads) != 1:
        raise UsageError(f"heads {sorted(heads)} differ between the attentions; Hugging Face's Mask2Former has one number")
    return _config(
        Mask2FormerConfig,
        backbone_config=_backbone_config(model.backbone),
        feature_size=predictor.width,
        mask_feature_size=predictor.width,
        hidden_dim=predictor.width,
        encoder_layers=len(encoder),
        encoder_feedforward_dim=encoder[0].linear1.out_features,
        decoder_layers=len(predictor.transformer_ffn_layers) + 1,
        dim_feedforward=predictor.transformer_ffn_layers[0].linear1.out_features,
        num_attention_heads=heads.pop(),
        num_queries=predictor.query_feat.num_embeddings,
        num_labels=predictor.class_embed.out_features - 1,
    )


def _config(kind: Any, **settings: Any) -> Any:
    """A configuration; its classes take settings of their bases that type checkers do not see."""
    return kind(**settings)


def _backbone_config(backbone: nn.Module) -> ResNetConfig | SwinConfig:
    if isinstance(backbone, ResNet):
        return _resnet_config(backbone)
    if isinstance(backbone, SwinTransformer):
        stages: Any = backbone.layers
        blocks = [list(stage.blocks) for stage in stages]
        return _config(
            SwinConfig,
            embed_dim=backbone.patch_embed.proj.out_channels,
            depths=[len(stage) for stage in blocks],
            num_heads=[stage[0].attn.heads for stage in blocks],
            window_size=blocks[0][0].window,
            drop_path_rate=blocks[-1][-1].drop_path,
            out_features=STAGES,
        )
    raise UsageError(f"backbone {type(backbone).__name__}; expected ResNet or SwinTransformer for Hugging Face's Mask2Former")


def _resnet_config(backbone: ResNet) -> ResNetConfig:
    stem, first = backbone.stem.conv1, backbone.get_submodule(LEVELS[0])[0]  # type: ignore[index]
    assert isinstance(stem, Conv2d)
    assert isinstance(first, Block)
    if isinstance(stem.norm, nn.GroupNorm):
        raise UsageError("a ResNet with norm='group'; Hugging Face's has batch norms, expected norm 'frozen' or 'batch'")
    return _config(
        ResNetConfig,
        embedding_size=stem.out_channels,
        hidden_sizes=[backbone.channels[level] for level in LEVELS],
        depths=[len(backbone.get_submodule(level)) for level in LEVELS],  # type: ignore[arg-type]
        layer_type="bottleneck" if hasattr(first, "conv3") else "basic",
        out_features=STAGES,
    )
