"""A recorded model answers as the model does, for its own size alone; the recorder stands in for CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import emca_bench
from emca_bench.deploy.cuda_graph import GraphedModel
from emca_bench.errors import UsageError
from emca_bench.models import Predictions, build_model


class Recorder:
    """Writes over the tensors of the recording, as a graph does."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, call: Callable[[], Predictions]) -> tuple[Callable[[], Any], Predictions]:
        self.recorded += 1
        fixed = call()

        def replay() -> None:
            self.replayed += 1
            made = call()
            fixed.class_logits.copy_(made.class_logits)
            fixed.mask_logits.copy_(made.mask_logits)

        return replay, fixed


def images(*shape: int) -> Tensor:
    return 255 * torch.rand(shape)


def test_every_call_gets_its_own_answer_from_one_recording() -> None:
    model = build_model("mask2former_tiny", num_classes=3, attention="none").eval().requires_grad_(False)
    record = Recorder()
    graphed = GraphedModel(model, record=record)
    batches = [images(2, 3, 64, 96) for _ in range(3)]
    # all answers first: a later replay must not change an earlier one
    answers = [graphed(batch) for batch in batches]
    for batch, found in zip(batches, answers, strict=True):
        wanted = model(batch)
        torch.testing.assert_close(found.class_logits, wanted.class_logits)
        torch.testing.assert_close(found.mask_logits, wanted.mask_logits)
        assert found.image_size == (64, 96)
    assert (record.recorded, record.replayed) == (1, 3)


@pytest.mark.parametrize(
    "other", [images(1, 3, 64, 64), images(2, 3, 64, 96), images(1, 3, 64, 96).double()], ids=["size", "batch", "dtype"]
)
def test_other_images_are_an_error(other: Tensor) -> None:
    graphed = GraphedModel(build_model("mask2former_tiny", num_classes=3, attention="none").eval(), record=Recorder())
    graphed(images(1, 3, 64, 96))
    with pytest.raises(UsageError, match=r"recorded for \[1, 3, 64, 96\] torch.float32 on cpu"):
        graphed(other)


def test_a_recording_that_fails_leaves_nothing_half_made() -> None:
    def fail(call: Callable[[], Predictions]) -> Any:
        raise RuntimeError("capture")

    graphed = GraphedModel(build_model("mask2former_tiny", num_classes=3, attention="none").eval(), record=fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="capture"):
            graphed(images(1, 3, 64, 96))


@pytest.mark.parametrize(("options", "words"), [({}, "the model is on cpu; expected a CUDA device")])
def test_a_graph_where_there_can_be_none_is_an_error(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        emca_bench.optimize(build_model("mask2former_tiny", num_classes=3, attention="none"), cuda_graph=True, **options)


@pytest.mark.gpu
def test_on_a_gpu_the_graph_answers_as_the_model_does() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = build_model("mask2former_tiny", num_classes=3, attention="none").eval().cuda()
    plain, graphed = emca_bench.optimize(model), emca_bench.optimize(model, cuda_graph=True)
    for _ in range(3):
        batch = images(1, 3, 64, 96).cuda()
        torch.testing.assert_close(graphed(batch).mask_logits, plain(batch).mask_logits, atol=1e-3, rtol=1e-3)
