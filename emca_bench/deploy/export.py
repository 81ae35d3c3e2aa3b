"""A model in the formats that other runtimes read: a graph of torch's standard operators, and ONNX.

The operators of `emca_kernels` become what their readable references are made of; nothing of this project is needed to run the result.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from emca_kernels.registration import reference_decompositions
from torch import Tensor, nn
from torch.export import ExportedProgram

from emca_bench.deploy.optimized import rewrite
from emca_bench.errors import UsageError
from emca_bench.models.mask2former import Mask2Former

SUFFIXES = (".onnx", ".pt2")
INPUT, OUTPUTS = "images", ("class_logits", "mask_logits")
OPSET = 18


class _AsTensors(nn.Module):
    """Predictions as two tensors."""

    def __init__(self, model: Mask2Former) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        predictions = self.model(images)
        return predictions.class_logits, predictions.mask_logits


def export_program(model: nn.Module, *, size: tuple[int, int], batch: int = 1) -> ExportedProgram:
    """A graph of standard operators from images [batch, 3, H, W] in 0..255 to class logits and mask logits.

    Exact rewrites are in it (see `rewrite`); the model that is given stays as it is.

    Args:
        model: a `Mask2Former` of `emca_bench.models`.
        size: (H, W) of the images, fixed in the graph.
        batch: images of a call, fixed in the graph.

    Raises:
        UsageError: another kind of model.
    """
    if not isinstance(model, Mask2Former):
        raise UsageError(f"export: a {type(model).__name__}; expected a Mask2Former of emca_bench.models")
    plain = copy.deepcopy(model).eval().requires_grad_(False)
    rewrite(plain)
    weight = plain.sem_seg_head.predictor.query_feat.weight
    images = torch.zeros(batch, 3, *size, dtype=weight.dtype, device=weight.device)
    with torch.no_grad(), _quietly():
        program = torch.export.export(_AsTensors(plain), (images,))
        return program.run_decompositions(reference_decompositions())


def export(model: nn.Module, path: Path, *, size: tuple[int, int], batch: int = 1) -> None:
    """Write a model as ONNX (`.onnx`) or as a program of torch (`.pt2`, read by `torch.export.load`).

    Args:
        model, size, batch: see `export_program`.
        path: of the file; its suffix says the format.

    Raises:
        UsageError: see `check_path` and `export_program`.
    """
    check_path(path)
    program = export_program(model, size=size, batch=batch)
    if path.suffix == ".pt2":
        with _quietly():
            torch.export.save(program, path)
        return
    options: dict[str, Any] = {"input_names": [INPUT], "output_names": list(OUTPUTS), "opset_version": OPSET}
    with _quietly():
        torch.onnx.export(program, (), str(path), dynamo=True, external_data=False, verbose=False, **options)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter's libraries say of each other."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


def check_path(path: Path) -> None:
    """Complain before any work about a file that cannot be written.

    Raises:
        UsageError: another suffix, no such folder, or the packages of the extra `export` are missing.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"export to {path}: suffix {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise UsageError(f"export to {path}: {path.parent} is no folder")
    if path.suffix == ".onnx" and importlib.util.find_spec("onnxscript") is None:
        raise UsageError("export to ONNX needs the packages onnx and onnxscript: pip install 'emca-bench[export]'")
