"""What a cell measures, as something that can be called: an operator, one attention, the decoder, the model, or images to label map."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from emca_kernels.specs import FORWARD
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from emca_bench.errors import UsageError, did_you_mean, listing
from emca_bench.measure.inputs import DTYPES, ImpossibleError, Maker
from emca_bench.measure.kernels import Work, check_kernel, kernel_call, with_backward
from emca_bench.measure.rivals import build_measured
from emca_bench.measure.runtimes import run_model
from emca_bench.measure.training_step import training_step
from emca_bench.models import CrossAttention, build_model
from emca_bench.models.mask2former import SIZE_DIVISIBILITY
from emca_bench.specs import Arm, parse_size

COMPILE = "compile"
"""Switch of an arm of scope attention: its module goes through torch.compile. Forward only."""
DECODER_STRIDES = (32, 16, 8)

MODEL_OVERRIDES = (
    *("queries", "width", "layers", "mask_source", "mask_rule", "pretrained", "frozen"),
    *("attention_layers", "other_attention", "mask_use"),
)
"""Parameters of a study that go to `build_model` as they are."""


@dataclass(frozen=True)
class Subject:
    """A module with its inputs.

    Attributes:
        module: what holds the parameters.
        call: one measured call.
        pixels_of_call: pixels of the feature level of each cross-attention call, in order.
        queries: Q.
        batch: images per call.
        work: least work of a call (scope kernel).
        kept: of a call that trains, tensors whose gradients stay when it is over: parameters and features.
    """

    module: nn.Module
    call: Callable[[], Any]
    pixels_of_call: tuple[int, ...]
    queries: int
    batch: int
    work: Work | None = None
    kept: tuple[Tensor, ...] = ()

    def cross_attentions(self) -> list[CrossAttention]:
        """The cross-attentions, in the order in which they are called."""
        return [module for module in self.module.modules() if isinstance(module, CrossAttention)]


def build_subject(arm: Arm, params: Mapping[str, Any], *, seed: int, device: str | None = None) -> Subject:
    """The subject of a cell, in evaluation mode, with random inputs that are the same for all arms.

    Args:
        arm: the contender.
        params: the cell's parameters.
        seed: of weights and inputs.
        device: overrides the cell's, "meta" to count.

    Raises:
        ImpossibleError: no such device.
        UsageError: an unknown name or a value that does not fit.
    """
    wanted = params.get("device", "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ImpossibleError("no CUDA device")
    if params.get("dtype", "float32") not in DTYPES:
        raise UsageError(f"unknown dtype {params['dtype']!r}{did_you_mean(params['dtype'], DTYPES)}; known: {listing(DTYPES)}")
    maker = Maker(dtype=DTYPES[params.get("dtype", "float32")], device=device or wanted, seed=seed)
    if params["scope"] == "kernel":
        call, work = kernel_call(arm, params, maker)
        return Subject(nn.Module(), call, (), 0, int(params["batch"]), work)
    if params["scope"] == "attention":
        return _attention_subject(arm, params, maker)
    return _model_subject(arm, params, maker)


def _attention_subject(arm: Arm, params: Mapping[str, Any], maker: Maker) -> Subject:
    shape = parse_size(str(params["pixels"]), what="parameter 'pixels'")
    pixels, batch, queries, width = shape[0] * shape[1], int(params["batch"]), int(params["queries"]), int(params["width"])
    torch.manual_seed(maker.seed)
    switches = dict[str, Any](arm.switches)
    compiled = switches.pop(COMPILE, False)
    module = maker.place(build_measured(arm.attention, width=width, **switches))
    if getattr(module, "prototypes", 1) > pixels:
        raise ImpossibleError(f"K={module.prototypes} prototypes from P={pixels} pixels")
    inputs = maker.normal(batch, queries, width), maker.normal(1, queries, width)
    level = maker.normal(batch, pixels, width), maker.normal(1, pixels, width)
    allowed = maker.mask(batch, queries, pixels, share=float(params.get("allowed", 1.0)))

    attend = module
    if compiled and maker.device != "meta":
        if params.get("pass", FORWARD) != FORWARD:
            raise ImpossibleError("compiled arms run forward only")
        attend = _compiled(module, (*inputs, *level, allowed), shape)

    def call() -> Tensor:
        return attend(*inputs, *level, allowed, shape=shape)

    if params.get("pass", FORWARD) == FORWARD:
        return Subject(module, call, (pixels,), queries, batch)
    module.train().requires_grad_(True)
    kept = (level[0].requires_grad_(), *module.parameters())
    trained = with_backward(call, [*kept, inputs[0].requires_grad_()], maker.normal)
    return Subject(module, trained, (pixels,), queries, batch, kept=kept)


def _compiled(module: nn.Module, inputs: tuple[Any, ...], shape: tuple[int, int]) -> Any:
    """The module through torch.compile, compiled here and now for these inputs."""
    attend = torch.compile(module, dynamic=False)
    try:
        with torch.inference_mode():
            attend(*inputs, shape=shape)
    except BackendCompilerFailed as error:
        raise ImpossibleError(f"torch.compile: {' '.join(str(error).splitlines()[:2])}") from error
    return attend


def model_overrides(arm: Arm, params: Mapping[str, Any]) -> dict[str, Any]:
    """What a cell changes in its model."""
    overrides = {name: params[name] for name in MODEL_OVERRIDES if name in params}
    return {**overrides, "attention": arm.attention, "attention_switches": dict(arm.switches)}


def _model_subject(arm: Arm, params: Mapping[str, Any], maker: Maker) -> Subject:
    height, width = parse_size(str(params["image_size"]), what="parameter 'image_size'")
    batch = int(params["batch"])
    torch.manual_seed(maker.seed)
    overrides = model_overrides(arm, params)
    model = build_model(str(params["model"]), num_classes=int(params["classes"]), **overrides)
    predictor = model.sem_seg_head.predictor
    padded = [size + -size % SIZE_DIVISIBILITY for size in (height, width)]
    levels = [(padded[0] // stride, padded[1] // stride) for stride in DECODER_STRIDES]
    pixels = tuple(levels[index % 3][0] * levels[index % 3][1] for index in range(len(predictor.transformer_cross_attention_layers)))
    queries = predictor.query_feat.num_embeddings

    images = maker.normal(batch, 3, height, width).mul_(50).add_(128)
    maker.place(model)
    if params["scope"] == "training_step":
        step, parameters = training_step(model, images, params, maker)
        return Subject(model, step, pixels, queries, batch, kept=tuple(parameters))
    running = run_model(str(params.get("runtime", "eager")), model, images)
    calls = {"model": running.predict, "end_to_end": running.label, "decoder": running.decode}
    call = calls[str(params["scope"])]
    if call is None:
        raise ImpossibleError(f"runtime {params['runtime']} has no mask decoder of its own to call")
    module = running.module.sem_seg_head.predictor if params["scope"] == "decoder" else running.module
    return Subject(module, call, pixels, queries, batch)


def check_arm(arm: Arm, params: Mapping[str, Any]) -> None:
    """Complain about unknown names, switches and values before anything is measured.

    Raises:
        UsageError: naming what is wrong.
    """
    with torch.device("meta"):
        if params["scope"] == "kernel":
            check_kernel(arm, params)
        elif params["scope"] == "attention":
            switches = {name: value for name, value in arm.switches.items() if name != COMPILE}
            build_measured(arm.attention, width=int(params["width"]), **dict[str, Any](switches))
        else:
            overrides = model_overrides(arm, params)
            if "pretrained" in overrides:
                # nothing to load onto the meta device
                overrides["pretrained"] = False
            build_model(str(params["model"]), num_classes=2, **overrides)
