"""A model as each runtime runs it, from the same weights: calls for predictions, for label maps, and of its mask decoder alone."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import emca_bench
from emca_bench.errors import UsageError
from emca_bench.inference import semantic
from emca_bench.measure.inputs import ImpossibleError
from emca_bench.models import Predictions
from emca_bench.models.mask2former import Mask2Former

Call = Callable[[], Any]


@dataclass(frozen=True)
class Running:
    """Calls on fixed images.

    Attributes:
        module: what holds the parameters.
        predict: images to predictions.
        label: images to label maps of their size.
        decode: pixel features to predictions; None where the runtime cannot be cut there.
    """

    module: Any
    predict: Call
    label: Call
    decode: Call | None = None


def run_model(runtime: str, model: Mask2Former, images: Tensor) -> Running:
    """A model on its way through a runtime of `specs.RUNTIMES`.

    Raises:
        ImpossibleError: the runtime is not installed, or does not serve the device or dtype.
    """
    return _RUNTIMES[runtime](model, images)


def _eager(model: Mask2Former, images: Tensor) -> Running:
    size = (int(images.shape[-2]), int(images.shape[-1]))
    # features as the pixel decoder hands them over: the time of an attention depends on their memory layout
    with torch.no_grad():
        mask_features, pyramid = model.sem_seg_head.pixel_decoder(model.backbone_maps(images))
    return Running(
        model,
        lambda: model(images),
        lambda: semantic(model(images), size),
        lambda: model.sem_seg_head.predictor(mask_features, pyramid, image_size=size),
    )


def _optimized(model: Mask2Former, images: Tensor) -> Running:
    faster: Any = emca_bench.optimize(model)
    return _eager(faster, images)


def _as_one(faster: Any, images: Tensor) -> Running:
    """A model that runs as a whole: its decoder cannot be called alone."""
    size = (int(images.shape[-2]), int(images.shape[-1]))
    return Running(faster, lambda: faster(images), lambda: semantic(faster(images), size))


def _compiled(model: Mask2Former, images: Tensor) -> Running:
    return _as_one(emca_bench.optimize(model, compile=True), images)


def _cuda_graph(model: Mask2Former, images: Tensor) -> Running:
    if images.device.type != "cuda":
        raise ImpossibleError(f"CUDA graphs are of CUDA devices, not of the {images.device.type}")
    return _as_one(emca_bench.optimize(model, cuda_graph=True), images)


def _onnxruntime(model: Mask2Former, images: Tensor) -> Running:
    from emca_bench.deploy.export import INPUT, export

    try:
        import onnxruntime
    except ImportError:
        raise ImpossibleError("onnxruntime is not installed: pip install 'emca-bench[export]'") from None
    if images.device.type != "cpu" or images.dtype != torch.float32:
        raise ImpossibleError(f"onnxruntime is measured on the CPU in float32, not on {images.device.type} in {images.dtype}")
    size = (int(images.shape[-2]), int(images.shape[-1]))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export(model, path, size=size, batch=len(images))
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def predict() -> Predictions:
        class_logits, mask_logits = session.run(None, {INPUT: images.numpy()})
        return Predictions(torch.from_numpy(class_logits), torch.from_numpy(mask_logits), size)

    return Running(model, predict, lambda: semantic(predict(), size))


def _transformers(model: Mask2Former, images: Tensor) -> Running:
    # by name: frameworks are imported by their integration alone
    name = "emca_bench.integrations.transformers"
    try:
        importlib.import_module(name)
    except (ImportError, UsageError) as error:
        raise ImpossibleError(str(error)) from None
    theirs = importlib.import_module(f"{name}.running").as_transformers_runs(model)
    size = (int(images.shape[-2]), int(images.shape[-1]))
    return Running(theirs, lambda: theirs(images), lambda: theirs.label(images, size))


_RUNTIMES: dict[str, Callable[[Mask2Former, Tensor], Running]] = {
    "eager": _eager,
    "optimized": _optimized,
    "compiled": _compiled,
    "cuda_graph": _cuda_graph,
    "onnxruntime": _onnxruntime,
    "transformers": _transformers,
}
