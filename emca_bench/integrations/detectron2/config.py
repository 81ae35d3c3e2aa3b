"""Configuration keys: Mask2Former's own, one node for the cross-attention, and a refusal of what is not implemented."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.projects.deeplab import add_deeplab_config

from emca_bench.errors import UsageError
from emca_bench.models.attention import ATTENTIONS
from emca_bench.models.backbones import LEVELS

CONFIGS = Path(__file__).parent / "configs"


def config_file(name: str) -> str:
    """Path of a configuration: `name` itself where such a file is, else below this package's `configs/`.

    Raises:
        UsageError: neither exists.
    """
    for path in (Path(name), CONFIGS / name):
        if path.is_file():
            return str(path)
    known = ", ".join(sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/*/*.yaml")))
    raise UsageError(f"no configuration {name!r}, neither as a file nor among the shipped: {known}")


def add_emca_config(cfg: CfgNode) -> None:
    """Add all keys that a Mask2Former configuration may set, and `MODEL.MASK_FORMER.CROSS_ATTENTION`.

    Takes the place of `add_maskformer2_config`; `add_deeplab_config` may be called before or not. The defaults of the model are those of
    Mask2Former's published configurations. Switches of the cross-attention are its keys in capitals; None keeps the preset's value.
    """
    if "POLY_LR_POWER" not in cfg.SOLVER:
        add_deeplab_config(cfg)
    cfg.MODEL.RESNETS.STEM_TYPE = "basic"

    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_semantic"
    cfg.INPUT.COLOR_AUG_SSD = False
    cfg.INPUT.SIZE_DIVISIBILITY = -1
    cfg.INPUT.IMAGE_SIZE = 1024
    cfg.INPUT.MIN_SCALE = 0.1
    cfg.INPUT.MAX_SCALE = 2.0

    cfg.SOLVER.OPTIMIZER = "ADAMW"
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    cfg.SOLVER.WEIGHT_DECAY_EMBED = 0.0

    cfg.MODEL.MASK_FORMER = _mask_former()
    head = cfg.MODEL.SEM_SEG_HEAD
    head.MASK_DIM = 256
    head.CONVS_DIM = 256
    head.PIXEL_DECODER_NAME = "MSDeformAttnPixelDecoder"
    head.IN_FEATURES = list(LEVELS)
    head.TRANSFORMER_ENC_LAYERS = 6
    head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES = list(LEVELS[1:])
    head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS = 4
    head.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS = 8
    cfg.MODEL.SWIN = _swin()


def _mask_former() -> CfgNode:
    node = CfgNode()
    node.DEEP_SUPERVISION = True
    node.NO_OBJECT_WEIGHT = 0.1
    node.CLASS_WEIGHT = 2.0
    node.MASK_WEIGHT = 5.0
    node.DICE_WEIGHT = 5.0
    node.TRAIN_NUM_POINTS = 12544
    node.OVERSAMPLE_RATIO = 3.0
    node.IMPORTANCE_SAMPLE_RATIO = 0.75

    node.TRANSFORMER_DECODER_NAME = "MultiScaleMaskedTransformerDecoder"
    node.TRANSFORMER_IN_FEATURE = "multi_scale_pixel_decoder"
    node.NHEADS = 8
    node.DROPOUT = 0.0
    node.DIM_FEEDFORWARD = 2048
    node.ENC_LAYERS = 0
    # counts the prediction before the first layer too
    node.DEC_LAYERS = 10
    node.PRE_NORM = False
    node.HIDDEN_DIM = 256
    node.NUM_OBJECT_QUERIES = 100
    node.ENFORCE_INPUT_PROJ = False
    node.SIZE_DIVISIBILITY = 32
    node.MASK_SOURCE = "logits"
    node.MASK_RULE = "threshold"

    switches = sorted({name for factory in (ATTENTIONS[name] for name in ATTENTIONS) for name in inspect.signature(factory).parameters})
    node.CROSS_ATTENTION = CfgNode({"NAME": "masked"} | {switch.upper(): None for switch in switches if switch != "width"})

    node.TEST = CfgNode()
    node.TEST.SEMANTIC_ON = True
    node.TEST.INSTANCE_ON = False
    node.TEST.PANOPTIC_ON = False
    node.TEST.OBJECT_MASK_THRESHOLD = 0.8
    node.TEST.OVERLAP_THRESHOLD = 0.8
    node.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE = False
    return node


def _swin() -> CfgNode:
    return CfgNode(
        {
            "PRETRAIN_IMG_SIZE": 224,
            "PATCH_SIZE": 4,
            "EMBED_DIM": 96,
            "DEPTHS": [2, 2, 6, 2],
            "NUM_HEADS": [3, 6, 12, 24],
            "WINDOW_SIZE": 7,
            "MLP_RATIO": 4.0,
            "QKV_BIAS": True,
            "QK_SCALE": None,
            "DROP_RATE": 0.0,
            "ATTN_DROP_RATE": 0.0,
            "DROP_PATH_RATE": 0.3,
            "APE": False,
            "PATCH_NORM": True,
            "OUT_FEATURES": list(LEVELS),
            "USE_CHECKPOINT": False,
        }
    )


ONLY: dict[str, tuple[Any, ...]] = {
    "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME": ("MultiScaleMaskedTransformerDecoder",),
    "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": ("multi_scale_pixel_decoder",),
    "MODEL.MASK_FORMER.DROPOUT": (0.0,),
    "MODEL.MASK_FORMER.ENC_LAYERS": (0,),
    "MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ": (False,),
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": (list(LEVELS),),
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES": (list(LEVELS[1:]),),
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS": (4,),
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": (4,),
    "MODEL.SEM_SEG_HEAD.NORM": ("GN",),
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": (1.0,),
    "MODEL.RESNETS.STEM_TYPE": ("basic",),
}
"""Keys that Mask2Former's configurations carry and of which one value is implemented."""

ONLY_SWIN: dict[str, tuple[Any, ...]] = {
    "MODEL.SWIN.PATCH_SIZE": (4,),
    "MODEL.SWIN.MLP_RATIO": (4.0,),
    "MODEL.SWIN.QKV_BIAS": (True,),
    "MODEL.SWIN.QK_SCALE": (None,),
    "MODEL.SWIN.DROP_RATE": (0.0,),
    "MODEL.SWIN.ATTN_DROP_RATE": (0.0,),
    "MODEL.SWIN.APE": (False,),
    "MODEL.SWIN.PATCH_NORM": (True,),
    "MODEL.SWIN.OUT_FEATURES": (list(LEVELS),),
    "MODEL.SWIN.USE_CHECKPOINT": (False,),
}
"""The same for the Swin backbone; without position embedding, PRETRAIN_IMG_SIZE changes nothing and may be anything."""


def check_only(cfg: CfgNode, only: dict[str, tuple[Any, ...]]) -> None:
    """Refuse values that are not implemented.

    Raises:
        UsageError: it names the key, the value and what is implemented.
    """
    for key, allowed in only.items():
        found: Any = cfg
        for part in key.split("."):
            found = found[part]
        found = list(found) if isinstance(found, tuple) else found
        if found not in allowed:
            raise UsageError(f"{key} is {found!r}; implemented: {', '.join(map(repr, allowed))}")


def check_model(cfg: CfgNode) -> None:
    """Refuse a model that would differ from what its configuration says.

    Raises:
        UsageError: a value of `ONLY`, widths that differ, or a padding that is no multiple of 32.
    """
    check_only(cfg, ONLY)
    head, former = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
    widths = {
        "MODEL.MASK_FORMER.HIDDEN_DIM": former.HIDDEN_DIM,
        "MODEL.SEM_SEG_HEAD.CONVS_DIM": head.CONVS_DIM,
        "MODEL.SEM_SEG_HEAD.MASK_DIM": head.MASK_DIM,
    }
    if len(set(widths.values())) > 1:
        raise UsageError(f"expected one width, found {', '.join(f'{key} {value}' for key, value in widths.items())}")
    if head.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS not in (8, former.NHEADS):
        raise UsageError(
            f"MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS is {head.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS}; "
            f"as in Mask2Former the pixel decoder has MODEL.MASK_FORMER.NHEADS = {former.NHEADS} heads"
        )
    if former.SIZE_DIVISIBILITY > 0 and former.SIZE_DIVISIBILITY % 32:
        raise UsageError(f"MODEL.MASK_FORMER.SIZE_DIVISIBILITY is {former.SIZE_DIVISIBILITY}; expected a multiple of 32, or -1 for 32")
