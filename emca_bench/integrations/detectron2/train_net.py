"""Train, resume or evaluate: `python -m emca_bench.integrations.detectron2.train_net --config-file FILE [KEY VALUE ...]`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog, build_detection_train_loader
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.utils import comm

from emca_bench.errors import UsageError
from emca_bench.integrations.detectron2.config import add_emca_config, check_only, config_file
from emca_bench.integrations.detectron2.evaluators import build_evaluator
from emca_bench.integrations.detectron2.mappers import build_mapper
from emca_bench.integrations.detectron2.solver import build_lr_scheduler, build_optimizer

log = logging.getLogger("detectron2.emca_bench")


class Trainer(DefaultTrainer):
    """detectron2's trainer with Mask2Former's mappers, optimiser and schedule, and evaluators by `evaluator_type`."""

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
        """See `emca_bench.integrations.detectron2.build_evaluator`."""
        return build_evaluator(cfg, dataset_name, output_folder)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Batches from the mapper named by `INPUT.DATASET_MAPPER_NAME`."""
        return build_detection_train_loader(cfg, mapper=build_mapper(cfg))

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        """See `emca_bench.integrations.detectron2.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        """Schedules of detectron2, and WarmupPolyLR."""
        return build_lr_scheduler(cfg, optimizer)

    def resume_or_load(self, resume: bool = True) -> None:
        """As detectron2's, but for a schedule that ends where this configuration says, not where the checkpoint's did."""
        super().resume_or_load(resume)
        if hasattr(self.scheduler, "max_iters"):
            self.scheduler.max_iters = self.max_iter


class CompleteCheckpointer(DetectionCheckpointer):
    """For evaluation: a model with random parts left has no score.

    Raises:
        UsageError: parameters that the file lacks or has in another shape.
    """

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        super()._log_incompatible_keys(incompatible)
        wrong = [*incompatible.missing_keys, *(name for name, *_ in incompatible.incorrect_shapes)]
        if wrong:
            raise UsageError(
                f"the checkpoint does not fill the model: {len(wrong)} tensors are missing or of another shape, the first is {wrong[0]!r}; "
                "is MODEL.MASK_FORMER.CROSS_ATTENTION.NAME what it was trained with?"
            )


def setup(args: argparse.Namespace) -> CfgNode:
    """The frozen configuration of a command line; logging, seeds and the output folder are set up.

    Raises:
        UsageError: no such file, or a value that is not implemented.
    """
    cfg = get_cfg()
    add_emca_config(cfg)
    if args.config_file:
        args.config_file = config_file(args.config_file)
        cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    fit_to_machine(cfg)
    check_only(cfg, {"TEST.AUG.ENABLED": (False,)})
    check_classes(cfg)
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def fit_to_machine(cfg: CfgNode) -> None:
    """Without a GPU: the CPU as device, and no mixed precision, which detectron2 has for CUDA alone."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        log.warning("MODEL.DEVICE is %r and there is no CUDA device: running on the CPU", cfg.MODEL.DEVICE)
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE == "cpu" and cfg.SOLVER.AMP.ENABLED:
        log.warning("SOLVER.AMP.ENABLED is off on the CPU")
        cfg.SOLVER.AMP.ENABLED = False


def check_classes(cfg: CfgNode) -> None:
    """Refuse a number of classes that is not the datasets'.

    Raises:
        UsageError: it names the dataset and both numbers.
    """
    kind = "thing_classes" if "instance" in cfg.INPUT.DATASET_MAPPER_NAME else "stuff_classes"
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        names = MetadataCatalog.get(name).get(kind)
        if names is not None and len(names) != cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES:
            raise UsageError(
                f"dataset {name!r} has {len(names)} classes, MODEL.SEM_SEG_HEAD.NUM_CLASSES is {cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES}"
            )


def main(args: argparse.Namespace) -> Any:
    """One process of the run: train, or with `--eval-only` evaluate `MODEL.WEIGHTS`; results by dataset and metric."""
    cfg = setup(args)
    if not args.eval_only:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()
    if not cfg.MODEL.WEIGHTS and not args.resume:
        raise UsageError("--eval-only needs weights: MODEL.WEIGHTS FILE, or --resume for the last checkpoint of OUTPUT_DIR")
    model = Trainer.build_model(cfg)
    CompleteCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    results = Trainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def run(arguments: Sequence[str] | None = None) -> int:
    """The command line; `--num-gpus` processes. Returns the exit code, 2 for input that cannot be used."""
    args = default_argument_parser().parse_args(arguments)
    try:
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except UsageError as error:
        print(f"train_net: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run())
