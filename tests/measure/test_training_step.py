from __future__ import annotations

import pytest
import torch

from emca_bench.measure.inputs import ImpossibleError, Maker
from emca_bench.measure.memory import peak_memory_bytes
from emca_bench.measure.subjects import Subject, build_subject
from emca_bench.measure.training_step import make_truth
from emca_bench.specs import Arm

STEP = {
    "scope": "training_step",
    "device": "cpu",
    "dtype": "float32",
    "model": "mask2former_tiny",
    "classes": 5,
    "batch": 2,
    "image_size": "70x100",
    "points": 200,
    "segments": 4,
}


def subject(**params: object) -> Subject:
    return build_subject(Arm(name="masked", attention="masked"), {**STEP, **params}, seed=0)


@pytest.mark.parametrize("mask_source", ["logits", "features"])
def test_a_step_returns_a_gradient_for_every_parameter_and_leaves_none(mask_source: str) -> None:
    step = subject(mask_source=mask_source)
    with torch.inference_mode():
        gradients = step.call()
    assert len(gradients) == len(step.kept) == len(list(step.module.parameters()))
    for gradient, parameter in zip(gradients, step.kept, strict=True):
        assert gradient.shape == parameter.shape
        assert gradient.isfinite().all()
        assert parameter.grad is None
    assert any(gradient.any() for gradient in gradients)


def test_both_mask_sources_have_the_same_gradients_at_the_same_points(seed: int) -> None:
    found = []
    for mask_source in ("logits", "features"):
        step = subject(mask_source=mask_source, dtype="float64")
        torch.manual_seed(seed)
        found.append(step.call())
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-9 * (1 + one.norm())


def test_hugging_face_s_step_has_the_same_gradients_at_the_same_points(seed: int) -> None:
    small = {"model": "mask2former_r50", "dtype": "float64", "layers": 3, "image_size": "64x96", "batch": 1, "mask_source": "features"}
    heads = []
    # theirs draws points of the default dtype
    torch.set_default_dtype(torch.float64)
    try:
        for runtime in ("eager", "transformers"):
            step = subject(runtime=runtime, **small)
            torch.manual_seed(seed)
            gradients = step.call()
            assert len(gradients) == len(step.kept)
            heads.append({tuple(gradient.shape): gradient for gradient in gradients if gradient is not None and len(gradient) == 6})
    finally:
        torch.set_default_dtype(torch.float32)
    ours, theirs = heads
    assert {(6,), (6, 256)} == ours.keys() == theirs.keys()
    for shape, gradient in ours.items():
        assert (gradient - theirs[shape]).norm() <= 1e-9 * theirs[shape].norm()


def test_losses_without_full_masks_take_less_memory() -> None:
    """Many queries on a small model, so that masks weigh something beside the rest."""
    wide = {"queries": 100, "image_size": "128x128", "batch": 1, "layers": 6}
    published, found = (peak_memory_bytes(subject(mask_source=source, **wide).call, device="cpu") for source in ("logits", "features"))
    masks = 6 * 100 * 32 * 32 * 4
    assert published - found > masks / 2


def test_a_runtime_that_does_not_train_is_impossible() -> None:
    with pytest.raises(ImpossibleError, match="runtime onnxruntime does not train"):
        subject(runtime="onnxruntime")


def test_truth_shares_the_image_out() -> None:
    truth = make_truth(4, 3, (64, 96), Maker(torch.float32, "cpu", seed=1))
    assert truth.labels.tolist() == [0, 1, 2, 0]
    assert torch.equal(truth.masks.sum(0), torch.ones(64, 96, dtype=torch.int64))
