"""Names of every known origin to ours, and to Hugging Face's."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emca_bench.models import build_model
from emca_bench.models.checkpoints import CheckpointError, to_original_names, to_transformers_names

LAYER = "sem_seg_head.predictor.transformer_cross_attention_layers.2."


def facts(name: str) -> dict[str, tuple[int, ...]]:
    folder = os.environ.get("EMCA_FACTS")
    if not folder:
        pytest.skip("EMCA_FACTS names no folder with the original's state dicts")
    lines = (Path(folder) / name).read_text().splitlines()
    return {name: ast.literal_eval(shape) for name, shape in (line.split(" ", 1) for line in lines)}


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def state(name: str, **options: object) -> dict[str, Tensor]:
    with torch.device("meta"):
        return build_model(name, num_classes=150, **options).state_dict()  # type: ignore[arg-type]


def test_r50_has_hugging_face_s_names_and_shapes() -> None:
    wanted = facts("mask2former_r50_state_dict_hf.txt")
    ours = {**state("mask2former_r50", attention="masked"), "criterion.empty_weight": torch.ones(151)}
    assert shapes(to_transformers_names(ours)) == wanted


def test_names_of_hugging_face_s_r50_become_the_original_s() -> None:
    theirs = {name: torch.empty(shape, device="meta") for name, shape in facts("mask2former_r50_state_dict_hf.txt").items()}
    recognised = to_original_names(theirs)
    assert recognised.naming == "Hugging Face transformers"
    found = {name: shape for name, shape in shapes(recognised.tensors).items() if not name.endswith("num_batches_tracked")}
    assert found == facts("mask2former_r50_state_dict.txt")


@pytest.mark.parametrize("name", ["mask2former_r50", "mask2former_swin_tiny"])
def test_there_and_back(name: str) -> None:
    model = build_model(name, num_classes=3, attention="masked", layers=2, encoder_layers=1)
    ours = {key: tensor for key, tensor in model.state_dict().items() if not key.endswith("relative_position_index")}
    back = to_original_names(to_transformers_names(ours)).tensors
    back = {key: tensor for key, tensor in back.items() if not key.endswith("num_batches_tracked")}
    assert back.keys() == ours.keys()
    for key, tensor in ours.items():
        assert torch.equal(back[key], tensor), key


def test_queries_keys_and_values_are_stacked_in_this_order() -> None:
    prefix = "model.transformer_module.decoder.layers.3.self_attn."
    parts = {f"{prefix}{part}_proj.bias": torch.full((2,), value) for part, value in (("v", 2.0), ("q", 0.0), ("k", 1.0))}
    tensors = to_original_names({**parts, "model.pixel_level_module.decoder.level_embed": torch.ones(1)}).tensors
    stacked = tensors["sem_seg_head.predictor.transformer_self_attention_layers.3.self_attn.in_proj_bias"]
    assert stacked.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_stack_with_a_part_missing_stays_apart() -> None:
    name = "model.transformer_module.decoder.layers.0.self_attn.q_proj.bias"
    tensors = {name: torch.ones(2), "model.pixel_level_module.decoder.level_embed": torch.ones(1)}
    assert name in to_original_names(tensors).tensors


@pytest.mark.parametrize(("keys", "queries"), [("feature_proj", "query_proj"), ("to_query", "to_key")], ids=["today", "first release"])
def test_pem_s_cross_attention(keys: str, queries: str) -> None:
    """The table of names in PEM's code, whose first release had them the wrong way round."""
    wanted = {
        f"{keys}.bn.running_mean": "local_conv.norm.running_mean",
        f"{keys}.bn.num_batches_tracked": "local_conv.norm.num_batches_tracked",
        f"{keys}.to_query_3x3.weight": "local_conv.conv.weight",
        f"{keys}.to_query_3x3.bias": "local_conv.conv.bias",
        f"{keys}.out.weight": "key_projection.weight",
        f"{queries}.0.bias": "query_norm.bias",
        f"{queries}.1.weight": "query_projection.weight",
        "proj.weight": "product_projection.weight",
        "final.bias": "out_projection.bias",
        "alpha": "alpha",
    }
    theirs = {f"{LAYER}{name}": torch.randn(1, 1, 4) if name == "alpha" else torch.randn(4) for name in wanted}
    recognised = to_original_names(theirs)
    assert recognised.naming == ("PEM" if keys == "feature_proj" else "PEM, its first release")
    for name, ours in wanted.items():
        assert torch.equal(recognised.tensors[f"{LAYER}multihead_attn.{ours}"], theirs[f"{LAYER}{name}"].flatten())
    assert len(recognised.tensors) == len(wanted)


def pem_names(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our PEM under the names of its repository."""
    theirs = {}
    for name, tensor in ours.items():
        for pattern, replacement in (
            (r"multihead_attn\.local_conv\.norm", "feature_proj.bn"),
            (r"multihead_attn\.local_conv\.conv", "feature_proj.to_query_3x3"),
            (r"multihead_attn\.key_projection", "feature_proj.out"),
            (r"multihead_attn\.query_norm", "query_proj.0"),
            (r"multihead_attn\.query_projection", "query_proj.1"),
            (r"multihead_attn\.product_projection", "proj"),
            (r"multihead_attn\.out_projection", "final"),
            (r"multihead_attn\.alpha", "alpha"),
        ):
            name = re.sub(pattern, replacement, name)
        theirs[name] = tensor[None, None] if name.endswith(".alpha") else tensor
    return theirs


def test_all_of_a_pem_checkpoint_has_a_place() -> None:
    ours = state("pem_r50")
    assert shapes(to_original_names(pem_names(ours)).tensors) == shapes(ours)


def test_static_query_is_the_query_feature() -> None:
    tensors = {"sem_seg_head.predictor.static_query.weight": torch.ones(2), f"{LAYER}norm.bias": torch.ones(1)}
    assert set(to_original_names(tensors).tensors) == {"sem_seg_head.predictor.query_feat.weight", f"{LAYER}norm.bias"}


def test_distributed_data_parallel_prefix_is_taken_off() -> None:
    recognised = to_original_names({"module.sem_seg_head.predictor.decoder_norm.bias": torch.ones(1)})
    assert set(recognised.tensors) == {"sem_seg_head.predictor.decoder_norm.bias"}
    assert recognised.naming == "Mask2Former, in DistributedDataParallel"


@pytest.mark.parametrize("first", ["stem.conv1.weight", "patch_embed.proj.weight", "backbone.stem.conv1.weight"])
def test_backbone_alone(first: str) -> None:
    recognised = to_original_names({first: torch.ones(1)})
    assert recognised.naming == "a detectron2 backbone alone"
    assert set(recognised.tensors) == {f"backbone.{first.removeprefix('backbone.')}"}


def test_hugging_face_model_without_its_heads() -> None:
    tensors = {"pixel_level_module.decoder.level_embed": torch.ones(1), "transformer_module.queries_features.weight": torch.ones(1)}
    names = set(to_original_names(tensors).tensors)
    assert names == {"sem_seg_head.pixel_decoder.transformer.level_embed", "sem_seg_head.predictor.query_feat.weight"}


def test_unknown_names_are_shown() -> None:
    with pytest.raises(
        CheckpointError, match=r"names of no known kind: layer1.0.conv1.weight, fc.bias, ...; expected those of Mask2Former"
    ):
        to_original_names({"layer1.0.conv1.weight": torch.ones(1), "fc.bias": torch.ones(1)})


@pytest.mark.parametrize("name", ["pem_r50", "mask2former_tiny"])
def test_what_hugging_face_has_no_name_for_is_an_error(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"\d+ of \d+ tensors have no name in Hugging Face's Mask2Former: sem_seg_head.pixel_decoder"):
        to_transformers_names(state(name))
