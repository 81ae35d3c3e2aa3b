"""EMCA and Mask2Former inside detectron2: a meta-architecture, a head, mappers, datasets, evaluators and a trainer.

    cfg = get_cfg()
    add_emca_config(cfg)
    cfg.merge_from_file(config_file("ade20k/semantic/emca_R50_bs16_160k.yaml"))
    model = build_model(cfg)

Keys are those of facebookresearch/Mask2Former; `MODEL.MASK_FORMER.CROSS_ATTENTION` is what is added.
"""

import emca_bench.integrations.detectron2.available  # noqa: F401
from emca_bench.integrations.detectron2 import backbone
from emca_bench.integrations.detectron2.config import add_emca_config, config_file
from emca_bench.integrations.detectron2.datasets import register_ade20k_panoptic, register_coco_panoptic_folder
from emca_bench.integrations.detectron2.evaluators import build_evaluator
from emca_bench.integrations.detectron2.head import EMCAMaskFormerHead
from emca_bench.integrations.detectron2.mappers import build_mapper
from emca_bench.integrations.detectron2.meta_arch import EMCAMaskFormer
from emca_bench.integrations.detectron2.solver import build_lr_scheduler, build_optimizer

__all__ = [
    "EMCAMaskFormer",
    "EMCAMaskFormerHead",
    "add_emca_config",
    "backbone",
    "build_evaluator",
    "build_lr_scheduler",
    "build_mapper",
    "build_optimizer",
    "config_file",
    "register_ade20k_panoptic",
    "register_coco_panoptic_folder",
]
