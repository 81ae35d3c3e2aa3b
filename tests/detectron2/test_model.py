from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances

from emca_bench.errors import UsageError
from emca_bench.inference import instances, panoptic, semantic_scores
from emca_bench.integrations.detectron2 import EMCAMaskFormer, add_emca_config, build_mapper, config_file
from emca_bench.integrations.detectron2.meta_arch import Truth, boxes_of
from emca_bench.models.attention import ATTENTIONS, build_attention
from emca_bench.models.backbones.resnet import ResNet
from emca_bench.models.mask2former import Mask2Former
from emca_bench.models.mask_decoder import MaskDecoder
from emca_bench.models.pixel_decoders.msdeform import MSDeformAttnPixelDecoder

PANOPTIC = "cityscapes/panoptic/emca_R50_bs16_90k.yaml"
SEMANTIC = "ade20k/semantic/mask2former_R50_bs16_160k.yaml"


def same_model(attention: str, classes: int) -> Mask2Former:
    """emca_bench's own model with the numbers of the tiny configuration."""
    backbone = ResNet(blocks=(3, 4, 6, 3), stem_width=8, bottleneck=True, norm="batch")
    return Mask2Former(
        backbone=backbone,
        pixel_decoder=MSDeformAttnPixelDecoder(channels=backbone.channels, width=32, layers=1),
        predictor=MaskDecoder(
            attention=lambda: build_attention(attention, width=32), width=32, classes=classes, queries=12, layers=3, heads=8, feedforward=64
        ),
    )


def pair(cfg: CfgNode) -> tuple[EMCAMaskFormer, Mask2Former]:
    theirs = build_model(cfg)
    for parameter in theirs.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    ours = same_model(cfg.MODEL.MASK_FORMER.CROSS_ATTENTION.NAME, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
    weights = {name: tensor for name, tensor in theirs.state_dict().items() if not name.startswith("criterion.")}
    ours.load_state_dict(weights)
    return theirs, ours


def image(height: int, width: int) -> torch.Tensor:
    return 255 * torch.rand(3, height, width)


@pytest.mark.parametrize("attention", ["masked", "masked_fused", "emca", "emca_soft"])
def test_results_equal_the_models_own(attention: str, tiny: Callable[..., CfgNode], cityscapes: Path):
    theirs, ours = pair(tiny(PANOPTIC, {"MODEL.MASK_FORMER.CROSS_ATTENTION.NAME": attention}))
    theirs.eval()
    ours.eval()
    pixels, size = image(50, 90), (75, 135)
    with torch.no_grad():
        (found,) = theirs([{"image": pixels, "height": size[0], "width": size[1]}])
        predictions = ours(pixels[None])
    scores = semantic_scores(predictions, size, resize_masks=True)[0]
    assert torch.allclose(found["sem_seg"], scores, atol=1e-5)
    things = theirs.results.things
    (expected,) = panoptic(predictions, size, things=things, object_threshold=0.0, overlap_threshold=0.0)
    ids, segments = found["panoptic_seg"]
    assert torch.equal(ids, expected.ids)
    assert segments == [{"id": s.id, "isthing": s.thing, "category_id": s.category} for s in expected.segments]
    (best,) = instances(predictions, size, things=things)
    assert torch.allclose(found["instances"].scores, best.scores, atol=1e-6)
    assert torch.equal(found["instances"].pred_classes, best.categories)
    assert torch.equal(found["instances"].pred_masks, best.masks)


@pytest.mark.parametrize("attention", ["masked", "emca"])
def test_losses_equal_the_models_own(attention: str, tiny: Callable[..., CfgNode], cityscapes: Path):
    cfg = tiny(PANOPTIC, {"MODEL.MASK_FORMER.CROSS_ATTENTION.NAME": attention})
    theirs, ours = pair(cfg)
    mapper = build_mapper(cfg)
    batch = [mapper(record) for record in DatasetCatalog.get("cityscapes_fine_panoptic_train")]
    images = torch.stack([entry["image"] for entry in batch]).float()
    targets = [Truth(entry["instances"].gt_classes, entry["instances"].gt_masks.tensor) for entry in batch]
    torch.manual_seed(3)
    found = theirs.train()(batch)
    torch.manual_seed(3)
    unweighted = theirs.criterion(ours.train()(images), targets)
    assert set(found) == set(unweighted)
    assert len(found) == 3 * cfg.MODEL.MASK_FORMER.DEC_LAYERS
    for name, loss in found.items():
        weight = 2.0 if name.startswith("loss_ce") else 5.0
        assert loss.item() == pytest.approx(weight * unweighted[name].item(), rel=1e-5), name
    assert sum(found.values()).item() == pytest.approx(theirs.criterion.total(unweighted).item(), rel=1e-5)


def test_images_of_a_batch_do_not_see_each_other(tiny: Callable[..., CfgNode], cityscapes: Path):
    model = build_model(tiny(PANOPTIC)).eval()
    large, small = image(64, 96), image(64, 64)
    with torch.no_grad():
        both = model([{"image": large}, {"image": small}])
        (alone,) = model([{"image": large}])
    assert torch.allclose(both[0]["sem_seg"], alone["sem_seg"], atol=1e-5)
    assert both[1]["sem_seg"].shape == (19, 64, 64)


def test_without_deep_supervision_the_last_prediction_alone_is_trained(tiny: Callable[..., CfgNode], cityscapes: Path):
    cfg = tiny(PANOPTIC, {"MODEL.MASK_FORMER.DEEP_SUPERVISION": False})
    batch = [build_mapper(cfg)(record) for record in DatasetCatalog.get("cityscapes_fine_panoptic_train")]
    assert set(build_model(cfg).train()(batch)) == {"loss_ce", "loss_mask", "loss_dice"}


def test_masks_may_be_tensors_and_smaller_than_the_padded_batch(tiny: Callable[..., CfgNode], cityscapes: Path):
    model = build_model(tiny(PANOPTIC)).train()
    truth = Instances((40, 70), gt_classes=torch.tensor([1, 4]), gt_masks=torch.rand(2, 40, 70) > 0.5)
    found = model([{"image": image(40, 70), "instances": truth}])
    assert all(loss.isfinite() for loss in found.values())
    packed = Instances((40, 60), gt_classes=truth.gt_classes, gt_masks=BitMasks(truth.gt_masks))
    same = model._truth({"instances": packed}, (96, 96)).masks
    assert torch.equal(same, model._truth({"instances": truth}, (96, 96)).masks)
    assert same.shape == (2, 96, 96)
    assert not same[:, 40:].any()
    with pytest.raises(UsageError, match=r"'a\.png' has no 'instances'"):
        model([{"image": image(64, 64), "file_name": "a.png"}])


def test_an_image_without_any_truth_trains(tiny: Callable[..., CfgNode], cityscapes: Path):
    truth = Instances((64, 64), gt_classes=torch.zeros(0, dtype=torch.int64), gt_masks=BitMasks(torch.zeros(0, 64, 64)))
    found = build_model(tiny(PANOPTIC)).train()([{"image": image(64, 64), "instances": truth}])
    sum(found.values()).backward()
    assert all(loss.isfinite() for loss in found.values())


@pytest.mark.parametrize("name", list(ATTENTIONS))
def test_every_registered_attention_trains_under_autocast(name: str, tiny: Callable[..., CfgNode], cityscapes: Path):
    cfg = tiny(PANOPTIC, {"MODEL.MASK_FORMER.CROSS_ATTENTION.NAME": name})
    batch = [build_mapper(cfg)(record) for record in DatasetCatalog.get("cityscapes_fine_panoptic_train")]
    model = build_model(cfg).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(batch)
    sum(found.values()).backward()
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in found.values())
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_names_and_shapes_are_the_originals():
    if not os.environ.get("EMCA_FACTS"):
        pytest.skip("EMCA_FACTS does not name the folder with the original's list of parameters")
    lines = (Path(os.environ["EMCA_FACTS"]) / "mask2former_r50_state_dict.txt").read_text().splitlines()
    cfg = get_cfg()
    add_emca_config(cfg)
    cfg.merge_from_file(config_file("cityscapes/semantic/mask2former_R50_bs16_90k.yaml"))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 150])
    found = [f"{name} {tuple(tensor.shape)}" for name, tensor in build_model(cfg).state_dict().items()]
    assert sorted(found) == sorted(line.strip() for line in lines if line.strip())


@pytest.mark.parametrize("author", ["Bowen Cheng", None])
def test_checkpoint_in_the_published_format_loads_whole(author: str | None, tiny: Callable[..., CfgNode], tmp_path: Path, caplog):
    source, target = build_model(tiny(SEMANTIC)), build_model(tiny(SEMANTIC))
    arrays = {name: tensor.numpy() for name, tensor in source.state_dict().items()}
    path = tmp_path / "model_final_500878.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": author}))
    caplog.set_level("WARNING")
    DetectionCheckpointer(target).load(str(path))
    assert not caplog.records
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name


def test_a_mask2former_checkpoint_starts_an_emca_model(tiny: Callable[..., CfgNode], tmp_path: Path, caplog):
    source = build_model(tiny(SEMANTIC))
    torch.save({"model": source.state_dict()}, tmp_path / "masked.pth")
    target = build_model(tiny(SEMANTIC.replace("mask2former", "emca")))
    caplog.set_level("WARNING")
    DetectionCheckpointer(target).load(str(tmp_path / "masked.pth"))
    assert "key_projection" in caplog.text
    shared = [name for name in target.state_dict() if "multihead_attn" not in name]
    assert all(torch.equal(target.state_dict()[name], source.state_dict()[name]) for name in shared)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"NAME": "emca", "PROTOTYPES": 4, "SELECTION": "topk_mean", "RESIDUAL": "raw"}, {"prototypes": 4, "residual": "raw"}),
        ({"NAME": "emca", "HEADS": 2}, {"heads": 2}),
        ({"NAME": "emca"}, {"heads": 1}),
        ({"NAME": "masked_fused"}, {"num_heads": 4, "fused": True}),
        ({"NAME": "masked", "HEADS": 2}, {"num_heads": 2, "fused": False}),
    ],
)
def test_switches_of_the_attention_arrive(options: dict[str, Any], expected: dict[str, Any], tiny: Callable[..., CfgNode]):
    keys = {f"MODEL.MASK_FORMER.CROSS_ATTENTION.{key}": value for key, value in options.items()}
    model = build_model(tiny(SEMANTIC, {"MODEL.MASK_FORMER.NHEADS": 4, **keys}))
    for layer in model.sem_seg_head.predictor.transformer_cross_attention_layers:
        assert {name: getattr(layer.multihead_attn, name) for name in expected} == expected


@pytest.mark.parametrize("pixel_decoder", ["BasePixelDecoder", "fpn", "csm_fpn"])
def test_pixel_decoder_by_the_originals_or_by_our_name(pixel_decoder: str, tiny: Callable[..., CfgNode]):
    model = build_model(tiny(SEMANTIC, {"MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": pixel_decoder})).eval()
    with torch.no_grad():
        assert model([{"image": image(64, 64)}])[0]["sem_seg"].shape == (150, 64, 64)


def test_swin_backbone(tiny: Callable[..., CfgNode]):
    options = {
        "MODEL.BACKBONE.NAME": "D2SwinTransformer",
        "MODEL.SWIN.EMBED_DIM": 12,
        "MODEL.SWIN.DEPTHS": [1, 1, 1, 1],
        "MODEL.SWIN.NUM_HEADS": [1, 2, 3, 6],
        "MODEL.SWIN.WINDOW_SIZE": 4,
    }
    model = build_model(tiny(SEMANTIC, options)).eval()
    assert "backbone.layers.0.blocks.0.attn.relative_position_bias_table" in model.state_dict()
    with torch.no_grad():
        assert model([{"image": image(60, 70)}])[0]["sem_seg"].shape == (150, 60, 70)
    with pytest.raises(UsageError, match=r"MODEL\.SWIN\.APE is True; implemented: False"):
        build_model(tiny(SEMANTIC, options | {"MODEL.SWIN.APE": True}))


def test_panoptic_results_need_to_know_things_from_stuff(tiny: Callable[..., CfgNode]):
    with pytest.raises(UsageError, match=r"needs a panoptic dataset as DATASETS\.TRAIN"):
        build_model(tiny(SEMANTIC, {"MODEL.MASK_FORMER.TEST.PANOPTIC_ON": True}))


def test_boxes_are_tight():
    masks = torch.rand(20, 9, 13) > 0.95
    masks[3] = False
    expected = BitMasks(masks).get_bounding_boxes().tensor
    assert torch.equal(boxes_of(masks), expected)
