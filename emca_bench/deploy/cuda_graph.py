"""A model whose kernels are recorded once and launched as one: what is left of a call's time is the GPU's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from emca_bench.errors import UsageError
from emca_bench.models import Predictions

WARMUPS = 3
"""Calls before the recording: tables are made and kernels tuned, which a recording may not do."""

Record = Callable[[Callable[[], Predictions]], tuple[Callable[[], Any], Predictions]]
"""Takes a call; gives what replays it, and the predictions that every replay writes anew."""


def record_cuda_graph(call: Callable[[], Predictions]) -> tuple[Callable[[], Any], Predictions]:
    """Warm a call up beside the current stream, as torch asks for, then record it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUPS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        predictions = call()
    return graph.replay, predictions


class GraphedModel(nn.Module):
    """Replays a model for images of the shape, dtype and device of its first call.

    Args:
        model: in evaluation mode, on a CUDA device.
        record: of a call; tests give another one.
    """

    def __init__(self, model: nn.Module, *, record: Record = record_cuda_graph) -> None:
        super().__init__()
        self.model = model
        self._record = record
        self._images: Tensor | None = None

    @torch.no_grad()
    def forward(self, images: Tensor) -> Predictions:
        """Images [B, 3, H, W] to predictions that later calls leave alone.

        Raises:
            UsageError: images unlike those of the first call.
        """
        if self._images is None:
            given = images.clone()
            self._replay, self._predictions = self._record(lambda: self.model(given))
            self._images = given
        fixed = self._images
        if (images.shape, images.dtype, images.device) != (fixed.shape, fixed.dtype, fixed.device):
            found, expected = (f"{list(one.shape)} {one.dtype} on {one.device}" for one in (images, fixed))
            raise UsageError(f"images: {found}; this CUDA graph was recorded for {expected}: optimize the model once more for another size")
        fixed.copy_(images)
        self._replay()
        made = self._predictions
        return Predictions(made.class_logits.clone(), made.mask_logits.clone(), made.image_size)
