"""AdamW with Mask2Former's parameter groups and full-model gradient clipping; the polynomial schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.projects.deeplab import build_lr_scheduler
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

from emca_bench.errors import UsageError, listing
from emca_bench.train.recipe import EMBEDDINGS, NORMS

__all__ = ["build_lr_scheduler", "build_optimizer"]

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"ADAMW": torch.optim.AdamW, "SGD": torch.optim.SGD}


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of `SOLVER`.

    Norms decay with WEIGHT_DECAY_NORM, embeddings with WEIGHT_DECAY_EMBED, all else with WEIGHT_DECAY; the backbone's rate is
    BACKBONE_MULTIPLIER times BASE_LR. CLIP_TYPE "full_model" bounds the 2-norm of all gradients together.

    Source: Mask2Former's training script and paper, section 4.1.

    Raises:
        UsageError: an unknown optimiser.
    """
    if cfg.SOLVER.OPTIMIZER not in OPTIMIZERS:
        raise UsageError(f"SOLVER.OPTIMIZER is {cfg.SOLVER.OPTIMIZER!r}; expected one of {listing(OPTIMIZERS)}")
    kind = OPTIMIZERS[cfg.SOLVER.OPTIMIZER]
    options: dict[str, Any] = {"lr": cfg.SOLVER.BASE_LR}
    if kind is torch.optim.SGD:
        options |= {"momentum": cfg.SOLVER.MOMENTUM, "nesterov": cfg.SOLVER.NESTEROV}
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.ENABLED and clip.CLIP_TYPE == "full_model":
        return full_model_clipping(kind, clip.CLIP_VALUE)(parameter_groups(cfg, model), **options)
    return maybe_add_gradient_clipping(cfg, kind(parameter_groups(cfg, model), **options))


def parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    """One group per pair of learning rate and weight decay, in the order of the model."""
    solver = cfg.SOLVER
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            rate = solver.BASE_LR * (solver.BACKBONE_MULTIPLIER if "backbone" in prefix.split(".") else 1.0)
            decay = solver.WEIGHT_DECAY
            if isinstance(module, NORMS):
                decay = solver.WEIGHT_DECAY_NORM
            elif isinstance(module, nn.Embedding):
                decay = solver.WEIGHT_DECAY_EMBED
            elif name in EMBEDDINGS:
                decay = 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()]


def full_model_clipping(kind: type[torch.optim.Optimizer], largest: float) -> type[torch.optim.Optimizer]:
    """The optimiser class with the 2-norm of all gradients bounded in front of every step."""

    class Clipped(kind):  # type: ignore[misc, valid-type]
        def step(self, closure: Callable[[], float] | None = None) -> Any:
            parameters = [parameter for group in self.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, largest)
            return super().step(closure)

    Clipped.__name__ = f"FullModelClipped{kind.__name__}"
    return Clipped
