"""A training step as something that can be called: images and truth to the gradients of all losses, the optimiser left out."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from emca_bench.data.targets import Targets
from emca_bench.measure.inputs import ImpossibleError, Maker
from emca_bench.models.criterion import Criterion
from emca_bench.models.mask2former import SIZE_DIVISIBILITY, Mask2Former

CELLS = 8
"""Sides of the grid in which generated segments lie."""


def training_step(model: Mask2Former, images: Tensor, params: Mapping[str, Any], maker: Maker) -> tuple[Callable[[], Any], list[Tensor]]:
    """One step on fixed images, and the parameters whose gradients it returns.

    The backbone's norms keep their statistics, as in fine-tuning. Random points are drawn anew in each step.

    Args:
        model: with its weights, on its device.
        images: [B, 3, H, W] in 0..255.
        params: of the cell; `points` and `segments` are read.
        maker: of the truth.

    Raises:
        ImpossibleError: a runtime that does not train.
    """
    runtime = str(params.get("runtime", "eager"))
    size = (int(images.shape[-2]) + -images.shape[-2] % SIZE_DIVISIBILITY, int(images.shape[-1]) + -images.shape[-1] % SIZE_DIVISIBILITY)
    classes = model.sem_seg_head.predictor.class_embed.out_features - 1
    targets = [make_truth(int(params["segments"]), classes, size, maker) for _ in images]
    model.requires_grad_(True)
    if runtime == "eager":
        model.train()
        model.backbone.eval()
        criterion = Criterion(classes=classes, points=int(params["points"])).to(images.device)

        def loss() -> Tensor:
            return criterion.total(criterion(model(images), targets))

        parameters: list[Tensor] = list(model.parameters())
    elif runtime == "transformers":
        theirs = importlib.import_module("emca_bench.integrations.transformers.running").as_transformers_trains(
            model, points=int(params["points"])
        )

        def loss() -> Tensor:
            return theirs.loss(images, [target.labels for target in targets], [target.masks for target in targets])

        parameters = list(theirs.hf_model.parameters())
    else:
        raise ImpossibleError(f"runtime {runtime} does not train")

    def step() -> Any:
        with torch.inference_mode(False), torch.enable_grad():
            return torch.autograd.grad(loss(), parameters, allow_unused=True)

    return step, parameters


def make_truth(segments: int, classes: int, size: tuple[int, int], maker: Maker) -> Targets:
    """Segments that share an image out, in cells of a coarse grid; some may be empty."""
    owner_HW = F.interpolate(maker.normal(1, segments, CELLS, CELLS).float(), size=size).argmax(1)[0]
    masks = owner_HW == torch.arange(segments, device=owner_HW.device)[:, None, None]
    return Targets(torch.arange(segments, device=owner_HW.device) % classes, masks, torch.ones_like(masks[0]))
