from __future__ import annotations

from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.projects.deeplab import add_deeplab_config

from emca_bench.errors import UsageError
from emca_bench.integrations.detectron2 import EMCAMaskFormer, add_emca_config, config_file
from emca_bench.integrations.detectron2.config import CONFIGS
from emca_bench.integrations.detectron2.train_net import fit_to_machine
from emca_bench.models.attention.emca import EMCA
from emca_bench.models.attention.masked import MaskedCrossAttention

# Mask2Former's recipes: iterations, classes, training edges, largest training and test edges, crop, padding, norm, data
RECIPES = {
    "ade20k/semantic/{}_R50_bs16_160k.yaml": (160000, 150, 512, 2048, 512, 2048, (512, 512), 512, "FrozenBN", "ade20k_sem_seg"),
    "ade20k/panoptic/{}_R50_bs16_160k.yaml": (160000, 150, 640, 2560, 640, 2560, (640, 640), 640, "FrozenBN", "ade20k_panoptic"),
    "cityscapes/semantic/{}_R50_bs16_90k.yaml": (90000, 19, 1024, 4096, 1024, 2048, (512, 1024), -1, "SyncBN", "cityscapes_fine_sem_seg"),
    "cityscapes/panoptic/{}_R50_bs16_90k.yaml": (90000, 19, 1024, 4096, 1024, 2048, (512, 1024), -1, "SyncBN", "cityscapes_fine_panoptic"),
}
MODELS = {"mask2former": MaskedCrossAttention, "emca": EMCA}


def load(path: str | Path) -> CfgNode:
    cfg = get_cfg()
    add_emca_config(cfg)
    # without running code that a file may hold
    cfg.merge_from_file(config_file(str(path)), allow_unsafe=False)
    return cfg


def test_every_shipped_configuration_is_listed_here():
    named = {name.format(model) for name in RECIPES for model in MODELS}
    assert {str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/*/*.yaml")} == named


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", MODELS)
def test_numbers_are_mask2formers(recipe: str, model: str):
    cfg = load(recipe.format(model))
    iterations, classes, edge, largest, test_edge, test_largest, crop, padding, norm, data = RECIPES[recipe]
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY) == (iterations, 16, 1e-4, 0.05)
    assert (cfg.SOLVER.WEIGHT_DECAY_NORM, cfg.SOLVER.WEIGHT_DECAY_EMBED, cfg.SOLVER.BACKBONE_MULTIPLIER) == (0.0, 0.0, 0.1)
    assert (cfg.SOLVER.OPTIMIZER, cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.POLY_LR_POWER) == ("ADAMW", "WarmupPolyLR", 0.9)
    assert (cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.WARMUP_FACTOR, cfg.SOLVER.POLY_LR_CONSTANT_ENDING) == (0, 1.0, 0.0)
    clip = cfg.SOLVER.CLIP_GRADIENTS
    assert (clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE, cfg.SOLVER.AMP.ENABLED) == (True, "full_model", 0.01, True)
    assert list(cfg.INPUT.MIN_SIZE_TRAIN) == [int(0.1 * tenths * edge) for tenths in range(5, 21)]
    assert (cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (largest, test_edge, test_largest)
    assert (tuple(cfg.INPUT.CROP.SIZE), cfg.INPUT.SIZE_DIVISIBILITY, cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA) == (crop, padding, 1.0)
    assert (cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.COLOR_AUG_SSD, cfg.INPUT.FORMAT) == (True, "absolute", True, "RGB")
    assert (cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING, cfg.INPUT.RANDOM_FLIP) == ("choice", "horizontal")
    assert (cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.RESNETS.STRIDE_IN_1X1) == (norm, 0, False)
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == classes
    assert cfg.DATASETS.TRAIN == (f"{data}_train",)
    assert cfg.DATASETS.TEST == (f"{data}_val",)
    flags = (cfg.MODEL.MASK_FORMER.TEST.SEMANTIC_ON, cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON, cfg.MODEL.MASK_FORMER.TEST.INSTANCE_ON)
    assert flags == ((True, True, True) if "panoptic" in recipe else (True, False, False))
    assert cfg.INPUT.DATASET_MAPPER_NAME == ("mask_former_panoptic" if "panoptic" in recipe else "mask_former_semantic")
    assert cfg.TEST.EVAL_PERIOD == 5000


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", MODELS)
def test_every_configuration_builds_its_model(recipe: str, model: str):
    cfg = load(recipe.format(model))
    # the attention under test in one layer instead of nine, to save seconds
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.MASK_FORMER.DEC_LAYERS", 2, "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 1])
    built = build_model(cfg)
    assert isinstance(built, EMCAMaskFormer)
    predictor = built.sem_seg_head.predictor
    assert predictor.query_feat.weight.shape == (100, 256)
    assert [type(layer.multihead_attn) for layer in predictor.transformer_cross_attention_layers] == [MODELS[model]]
    assert built.criterion.empty_weight[-1] == pytest.approx(0.1)
    assert (built.criterion.points, built.criterion.oversampling, built.criterion.importance) == (12544, 3.0, 0.75)
    assert built.criterion.weights == {"loss_ce": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    classes, data = RECIPES[recipe][1], RECIPES[recipe][-1]
    assert sum(built.results.things) == {"ade20k_panoptic": 100, "cityscapes_fine_panoptic": 8}.get(data, classes)
    assert (built.results.object_threshold, built.results.overlap_threshold, built.results.most) == (0.8, 0.8, 100)


# the keys of a published Mask2Former configuration, its base files merged, with its own way to write a list
ORIGINAL = """
MODEL:
  META_ARCHITECTURE: "MaskFormer"
  WEIGHTS: "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
  PIXEL_MEAN: [123.675, 116.280, 103.530]
  PIXEL_STD: [58.395, 57.120, 57.375]
  BACKBONE: {FREEZE_AT: 0, NAME: "build_resnet_backbone"}
  RESNETS:
    DEPTH: 50
    STEM_TYPE: "basic"
    STEM_OUT_CHANNELS: 64
    STRIDE_IN_1X1: False
    OUT_FEATURES: ["res2", "res3", "res4", "res5"]
    RES5_MULTI_GRID: [1, 1, 1]
  SEM_SEG_HEAD:
    NAME: "MaskFormerHead"
    IGNORE_VALUE: 255
    NUM_CLASSES: 150
    LOSS_WEIGHT: 1.0
    CONVS_DIM: 256
    MASK_DIM: 256
    NORM: "GN"
    PIXEL_DECODER_NAME: "MSDeformAttnPixelDecoder"
    IN_FEATURES: ["res2", "res3", "res4", "res5"]
    DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES: ["res3", "res4", "res5"]
    COMMON_STRIDE: 4
    TRANSFORMER_ENC_LAYERS: 6
  MASK_FORMER:
    TRANSFORMER_DECODER_NAME: "MultiScaleMaskedTransformerDecoder"
    TRANSFORMER_IN_FEATURE: "multi_scale_pixel_decoder"
    DEEP_SUPERVISION: True
    NO_OBJECT_WEIGHT: 0.1
    CLASS_WEIGHT: 2.0
    MASK_WEIGHT: 5.0
    DICE_WEIGHT: 5.0
    HIDDEN_DIM: 256
    NUM_OBJECT_QUERIES: 100
    NHEADS: 8
    DROPOUT: 0.0
    DIM_FEEDFORWARD: 2048
    ENC_LAYERS: 0
    PRE_NORM: False
    ENFORCE_INPUT_PROJ: False
    SIZE_DIVISIBILITY: 32
    DEC_LAYERS: 10
    TRAIN_NUM_POINTS: 12544
    OVERSAMPLE_RATIO: 3.0
    IMPORTANCE_SAMPLE_RATIO: 0.75
    TEST: {SEMANTIC_ON: True, INSTANCE_ON: False, PANOPTIC_ON: False, OVERLAP_THRESHOLD: 0.8, OBJECT_MASK_THRESHOLD: 0.8}
DATASETS:
  TRAIN: ("ade20k_sem_seg_train",)
  TEST: ("ade20k_sem_seg_val",)
SOLVER:
  IMS_PER_BATCH: 16
  BASE_LR: 0.0001
  MAX_ITER: 160000
  WARMUP_FACTOR: 1.0
  WARMUP_ITERS: 0
  WEIGHT_DECAY: 0.05
  OPTIMIZER: "ADAMW"
  LR_SCHEDULER_NAME: "WarmupPolyLR"
  BACKBONE_MULTIPLIER: 0.1
  CLIP_GRADIENTS: {ENABLED: True, CLIP_TYPE: "full_model", CLIP_VALUE: 0.01, NORM_TYPE: 2.0}
  AMP: {ENABLED: True}
INPUT:
  MIN_SIZE_TRAIN: !!python/object/apply:eval ["[int(x * 0.1 * 512) for x in range(5, 21)]"]
  MIN_SIZE_TRAIN_SAMPLING: "choice"
  MIN_SIZE_TEST: 512
  MAX_SIZE_TRAIN: 2048
  MAX_SIZE_TEST: 2048
  CROP:
    ENABLED: True
    TYPE: "absolute"
    SIZE: (512, 512)
    SINGLE_CATEGORY_MAX_AREA: 1.0
  COLOR_AUG_SSD: True
  SIZE_DIVISIBILITY: 512
  FORMAT: "RGB"
  DATASET_MAPPER_NAME: "mask_former_semantic"
TEST:
  EVAL_PERIOD: 5000
  AUG: {ENABLED: False, MIN_SIZES: [256, 384, 512, 640, 768, 896], MAX_SIZE: 3584, FLIP: True}
DATALOADER: {FILTER_EMPTY_ANNOTATIONS: True, NUM_WORKERS: 4}
VERSION: 2
"""


@pytest.mark.parametrize("deeplab_first", [False, True])
def test_a_mask2former_configuration_needs_one_changed_key(deeplab_first: bool, tmp_path: Path):
    (tmp_path / "original.yaml").write_text(ORIGINAL)
    cfg = get_cfg()
    if deeplab_first:
        add_deeplab_config(cfg)
    add_emca_config(cfg)
    cfg.merge_from_file(str(tmp_path / "original.yaml"))
    cfg.MODEL.META_ARCHITECTURE = "EMCAMaskFormer"
    shipped = load("ade20k/semantic/mask2former_R50_bs16_160k.yaml")
    for unread in ("MODEL.SEM_SEG_HEAD.NAME", "MODEL.RESNETS.RES5_MULTI_GRID", "TEST.AUG.MIN_SIZES", "TEST.AUG.MAX_SIZE"):
        node, _, key = unread.rpartition(".")
        source, target = cfg, shipped
        for part in node.split("."):
            source, target = source[part], target[part]
        target[key] = source[key]
    assert cfg == shipped
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.MASK_FORMER.DEC_LAYERS", 2, "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 1])
    before = cfg.dump()
    assert isinstance(build_model(cfg), EMCAMaskFormer)
    assert cfg.dump() == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", "StandardTransformerDecoder"),
        ("MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "res5"),
        ("MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ", True),
        ("MODEL.MASK_FORMER.DROPOUT", 0.1),
        ("MODEL.MASK_FORMER.ENC_LAYERS", 6),
        ("MODEL.MASK_FORMER.SIZE_DIVISIBILITY", 48),
        ("MODEL.MASK_FORMER.HIDDEN_DIM", 128),
        ("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res3", "res4", "res5"]),
        ("MODEL.SEM_SEG_HEAD.NORM", "BN"),
        ("MODEL.SEM_SEG_HEAD.LOSS_WEIGHT", 0.5),
        ("MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS", 8),
        ("MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS", 4),
        ("MODEL.RESNETS.STEM_TYPE", "deeplab"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(key: str, value: object):
    cfg = load("ade20k/semantic/mask2former_R50_bs16_160k.yaml")
    cfg.merge_from_list([key, value])
    with pytest.raises(UsageError, match=key):
        build_model(cfg)


def test_without_a_gpu_the_cpu_runs_in_full_precision(monkeypatch: pytest.MonkeyPatch):
    for present, expected in ((False, ("cpu", False)), (True, ("cuda", True))):
        monkeypatch.setattr("torch.cuda.is_available", lambda present=present: present)
        cfg = load("ade20k/semantic/emca_R50_bs16_160k.yaml")
        fit_to_machine(cfg)
        assert (cfg.MODEL.DEVICE, cfg.SOLVER.AMP.ENABLED) == expected
