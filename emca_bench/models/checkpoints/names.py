"""Parameter names of published checkpoints to this project's, which are those of facebookresearch/Mask2Former, and back to Hugging Face's.

Which naming a file has is told from the names in it, never from a version number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from emca_bench.models.checkpoints.files import CheckpointError
from emca_bench.models.checkpoints.rename import Renaming, Rule

ENCODER, PIXELS, QUERIES = "model.pixel_level_module.encoder.", "model.pixel_level_module.decoder.", "model.transformer_module."


def _resnet() -> list[Rule]:
    rules = [
        Rule("backbone.stem.conv1.norm.", f"{ENCODER}embedder.embedder.normalization."),
        Rule("backbone.stem.conv1.", f"{ENCODER}embedder.embedder.convolution."),
    ]
    for stage in range(4):
        for ours, theirs in (("shortcut", "shortcut"), ("conv1", "layer.0"), ("conv2", "layer.1"), ("conv3", "layer.2")):
            ours, theirs = f"backbone.res{stage + 2}.#.{ours}.", f"{ENCODER}encoder.stages.{stage}.layers.#.{theirs}."
            rules += [Rule(f"{ours}norm.", f"{theirs}normalization."), Rule(ours, f"{theirs}convolution.")]
    return rules


def _swin() -> list[Rule]:
    ours, theirs = "backbone.layers.#.blocks.#.", f"{ENCODER}swin.encoder.layers.#.blocks.#."
    return [
        Rule("backbone.patch_embed.proj.", f"{ENCODER}swin.embeddings.patch_embeddings.projection."),
        Rule("backbone.patch_embed.norm.", f"{ENCODER}swin.embeddings.norm."),
        Rule(f"{ours}norm1.", f"{theirs}layernorm_before."),
        Rule(f"{ours}norm2.", f"{theirs}layernorm_after."),
        *(Rule(f"{ours}attn.qkv.", f"{theirs}attention.{part}_proj.", index) for index, part in enumerate("qkv")),
        Rule(f"{ours}attn.proj.", f"{theirs}attention.o_proj."),
        Rule(f"{ours}attn.relative_position_bias_table", f"{theirs}attention.relative_position_bias.relative_position_bias_table"),
        Rule(f"{ours}mlp.", f"{theirs}mlp."),
        Rule("backbone.layers.#.downsample.", f"{ENCODER}swin.encoder.layers.#.downsample."),
        *(Rule(f"backbone.norm{stage}.", f"{ENCODER}hidden_states_norms.stage{stage + 1}.") for stage in range(4)),
    ]


def _pixel_decoder() -> list[Rule]:
    decoder = "sem_seg_head.pixel_decoder."
    ours, theirs = f"{decoder}transformer.encoder.layers.#.", f"{PIXELS}encoder.layers.#."
    rules = [
        Rule(f"{decoder}input_proj.", f"{PIXELS}input_projections."),
        Rule(f"{decoder}transformer.level_embed", f"{PIXELS}level_embed"),
        Rule(f"{ours}norm1.", f"{theirs}self_attn_layer_norm."),
        Rule(f"{ours}norm2.", f"{theirs}final_layer_norm."),
        Rule(f"{ours}linear", f"{theirs}fc"),
        Rule(f"{ours}self_attn.", f"{theirs}self_attn."),
        Rule(f"{decoder}mask_features.", f"{PIXELS}mask_projection."),
    ]
    for layer in ("adapter_1", "layer_1"):
        rules += [Rule(f"{decoder}{layer}.norm.", f"{PIXELS}{layer}.1."), Rule(f"{decoder}{layer}.", f"{PIXELS}{layer}.0.")]
    return rules


def _mask_decoder() -> list[Rule]:
    decoder = "sem_seg_head.predictor."
    cross, among, ffn = (f"{decoder}transformer_{name}_layers.#." for name in ("cross_attention", "self_attention", "ffn"))
    layer = f"{QUERIES}decoder.layers.#."
    return [
        Rule(f"{cross}multihead_attn.", f"{layer}cross_attn."),
        Rule(f"{cross}norm.", f"{layer}cross_attn_layer_norm."),
        *(Rule(f"{among}self_attn.in_proj_", f"{layer}self_attn.{part}_proj.", index) for index, part in enumerate("qkv")),
        Rule(f"{among}self_attn.out_proj.", f"{layer}self_attn.out_proj."),
        Rule(f"{among}norm.", f"{layer}self_attn_layer_norm."),
        Rule(f"{ffn}linear", f"{layer}fc"),
        Rule(f"{ffn}norm.", f"{layer}final_layer_norm."),
        Rule(f"{decoder}decoder_norm.", f"{QUERIES}decoder.layernorm."),
        Rule(f"{decoder}mask_embed.layers.#.", f"{QUERIES}decoder.mask_predictor.mask_embedder.#.0."),
        Rule(f"{decoder}query_feat.", f"{QUERIES}queries_features."),
        Rule(f"{decoder}query_embed.", f"{QUERIES}queries_embedder."),
        Rule(f"{decoder}level_embed.", f"{QUERIES}level_embed."),
        Rule(f"{decoder}class_embed.", "class_predictor."),
        Rule("criterion.empty_weight", "criterion.empty_weight"),
    ]


TRANSFORMERS = Renaming([*_resnet(), *_swin(), *_pixel_decoder(), *_mask_decoder()])

SWIN_OF_TRANSFORMERS_4 = [
    (r"^(.*pixel_level_module\.encoder\.)(embeddings|encoder\.layers)\.", r"\1swin.\2."),
    (r"\.attention\.self\.(q|k|v)(uery|ey|alue)\.", r".attention.\1_proj."),
    (r"\.attention\.self\.relative_position_bias_table$", ".attention.relative_position_bias.relative_position_bias_table"),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
]

IGNORED = ("criterion.", "pixel_mean", "pixel_std", f"{ENCODER}swin.layernorm.")
"""Beginnings of names that a Mask2Former's files hold and its function does not use: the loss's weights, constants, a norm behind Swin."""

COUNTERS = (".num_batches_tracked", ".relative_position_index", ".attn_mask")
"""Ends of names of buffers that are no weights: counters that nothing reads, and tables that a model makes of its own sizes."""


def _pem() -> list[Rule]:
    """PEM's cross-attention; its first release called what makes the keys `to_query`, and what makes the queries `to_key`."""
    layer = "sem_seg_head.predictor.transformer_cross_attention_layers.#."
    ours = f"{layer}multihead_attn."
    rules = [
        Rule(f"{ours}alpha", f"{layer}alpha"),
        Rule(f"{ours}product_projection.", f"{layer}proj."),
        Rule(f"{ours}out_projection.", f"{layer}final."),
    ]
    for keys, queries in (("feature_proj", "query_proj"), ("to_query", "to_key")):
        rules += [
            Rule(f"{ours}local_conv.norm.", f"{layer}{keys}.bn."),
            Rule(f"{ours}local_conv.conv.", f"{layer}{keys}.to_query_3x3."),
            Rule(f"{ours}key_projection.", f"{layer}{keys}.out."),
            Rule(f"{ours}query_norm.", f"{layer}{queries}.0."),
            Rule(f"{ours}query_projection.", f"{layer}{queries}.1."),
        ]
    return rules


PEM = Renaming(_pem())


@dataclass(frozen=True)
class Recognised:
    """A checkpoint under this project's names.

    Attributes:
        naming: whose names it had, in words.
        tensors: under this project's names; what has no place in them keeps its own.
    """

    naming: str
    tensors: dict[str, Tensor]


def to_original_names(tensors: Mapping[str, Tensor]) -> Recognised:
    """A checkpoint of any known naming under the names of facebookresearch/Mask2Former.

    Known are these themselves, detectron2 backbones alone, PEM's, and Hugging Face's of transformers 4 and 5; each of them with
    `module.` in front too, as DistributedDataParallel saves.

    Raises:
        CheckpointError: none of these.
    """
    names = list(tensors)
    wrapped = bool(names) and all(name.startswith("module.") for name in names)
    if wrapped:
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    naming, renamed = _recognise(tensors)
    return Recognised(f"{naming}, in DistributedDataParallel" if wrapped else naming, renamed)


def recognised_file(path: str | Path, tensors: Mapping[str, Tensor]) -> Recognised:
    """The same for what was read from a file, which an error names."""
    try:
        return to_original_names(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from None


def _recognise(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    text = "\n".join(["", *tensors, ""])
    if "pixel_level_module." in text:
        if "\npixel_level_module." in text:  # saved from the model without its heads
            tensors = {
                f"model.{name}" if name.split(".")[0] in ("pixel_level_module", "transformer_module") else name: tensor
                for name, tensor in tensors.items()
            }
        swin = ", Swin as in version 4" if ".attention.self.query." in text else ""
        return f"Hugging Face transformers{swin}", TRANSFORMERS.to_ours(_swin_of_transformers_5(tensors))
    if ".feature_proj." in text or ".to_query." in text:
        renamed = PEM.to_ours(_static_query(tensors))
        flat = {name: tensor.flatten() if name.endswith(".alpha") else tensor for name, tensor in renamed.items()}
        return "PEM, its first release" if ".to_query." in text else "PEM", flat
    if "\nsem_seg_head." in text:
        return "Mask2Former", _static_query(tensors)
    if "\nbackbone." in text:
        return "a detectron2 backbone alone", dict(tensors)
    if "\nstem.conv1." in text or "\npatch_embed.proj." in text:
        return "a detectron2 backbone alone", {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    first = ", ".join(list(tensors)[:3])
    raise CheckpointError(
        f"names of no known kind: {first}, ...; expected those of Mask2Former (sem_seg_head.predictor...), a detectron2 backbone "
        "(backbone..., stem.conv1...), PEM, or Hugging Face's Mask2Former (model.pixel_level_module...)"
    )


def _static_query(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mask2Former's first files called the queries' features so."""
    return {name.replace(".static_query.", ".query_feat."): tensor for name, tensor in tensors.items()}


def _swin_of_transformers_5(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        if ".pixel_level_module.encoder." in name:
            for pattern, replacement in SWIN_OF_TRANSFORMERS_4:
                name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def to_transformers_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a Mask2Former under Hugging Face's names (transformers 5).

    Counters of batch norms, which Hugging Face's model has and the original has not, are zeros.

    Args:
        tensors: under this project's names.

    Raises:
        CheckpointError: a tensor has no place there.
    """
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith(COUNTERS)}
    renamed, left = TRANSFORMERS.to_theirs(weights)
    if left:
        raise CheckpointError(
            f"{len(left)} of {len(weights)} tensors have no name in Hugging Face's Mask2Former: {', '.join(left[:5])}"
            f"{', ...' if len(left) > 5 else ''}; expected a Mask2Former with a ResNet or Swin backbone and the pixel decoder msdeform"
        )
    for name in list(renamed):
        if name.endswith(".running_var"):
            renamed[name.replace(".running_var", ".num_batches_tracked")] = torch.zeros((), dtype=torch.int64)
    return renamed
