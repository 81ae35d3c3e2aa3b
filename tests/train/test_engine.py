"""What a training computes, and what it says when it cannot go on."""

from __future__ import annotations

import gc
import pickle
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from emca_bench.data import IGNORE, VOID, Augmentation, Sample, Segment
from emca_bench.data.targets import collate
from emca_bench.errors import UsageError
from emca_bench.models import build_model
from emca_bench.models.criterion import Criterion
from emca_bench.models.matcher import DivergedError
from emca_bench.train import Files, train
from emca_bench.train.feed import Steps, feed, pack
from emca_bench.train.loop import step_seed
from emca_bench.train.recipe import Recipe, freeze_norms
from emca_bench.train.trouble import OutOfMemoryError

Run = Callable[..., Any]
Unlabelled = Callable[[Sample], Sample]


def test_loader_processes_change_nothing(run: Run, scenes: list[Sample]):
    alone, log = run(scenes, steps=3)
    ahead, other = run(scenes, steps=3, workers=2)
    assert log.losses == other.losses
    assert all(torch.equal(tensor, ahead[name]) for name, tensor in alone.items())
    assert 0 < other.loading_seconds
    assert 0 < log.waiting_seconds < log.seconds


def test_every_epoch_has_every_image_once(scenes: list[Sample]):
    steps = Steps(scenes, Recipe(steps=9, batch=2, crop=(64, 64), seed=5), "panoptic")
    named: list[str] = []
    original = steps._augment
    steps._augment = lambda sample, rng: (named.append(sample.name), original(sample, rng))[1]  # type: ignore[assignment]
    for step in range(9):
        steps[step]
    epochs = [named[start : start + 6] for start in range(0, 18, 6)]
    assert all(sorted(epoch) == sorted(sample.name for sample in scenes) for epoch in epochs)
    assert epochs[0] != epochs[1] or epochs[1] != epochs[2]


def test_processes_share_every_batch(scenes: list[Sample]):
    recipe = Recipe(steps=3, batch=4, crop=(64, 64), seed=5)
    whole, *parts = (Steps(scenes, recipe, "panoptic", rank=rank, processes=count) for rank, count in ((0, 1), (0, 2), (1, 2)))
    for step in range(3):
        joint = torch.cat([part[step].images for part in parts])
        assert torch.equal(joint, whole[step].images)


@pytest.mark.parametrize("task", ["semantic", "panoptic"])
def test_packed_batches_hold_what_was_collated(scenes: list[Sample], unlabelled: Unlabelled, task: str):
    """An image without targets among them."""
    images, targets = collate([*scenes[:3], unlabelled(scenes[3])], task)
    batch = pack(images, targets, 1.5)
    again, found = batch.on("cpu")
    assert torch.equal(again, images)
    assert again.is_contiguous(memory_format=torch.channels_last)
    for one, other in zip(targets, found, strict=True):
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.masks, other.masks)
        assert torch.equal(one.valid, other.valid)


def test_seeds_of_steps_are_apart():
    seeds = {step_seed(seed, step, rank) for seed in range(4) for step in range(40) for rank in range(4)}
    assert len(seeds) == 640
    assert max(seeds) < 2**63


def test_a_loss_on_the_choice_changes_what_is_learned_and_not_what_is_recorded(run: Run, scenes: list[Sample]):
    plain, without = run(scenes, steps=2)
    drawn, log = run(scenes, steps=2, selection_weight=1.0, ema=0.5)
    assert log.losses[0] == without.losses[0]
    assert log.losses[1] != without.losses[1]
    assert all(tensor.isfinite().all() for tensor in drawn.values())
    assert not torch.equal(drawn["sem_seg_head.predictor.query_feat.weight"], plain["sem_seg_head.predictor.query_feat.weight"])


def test_a_loss_on_the_choice_needs_a_choice(run: Run, scenes: list[Sample]):
    with pytest.raises(UsageError, match="no cross-attention of the model chooses pixels by a score"):
        run(scenes, steps=1, attention="masked", selection_weight=1.0)


def test_averaged_weights_are_the_decayed_mean(tmp_path: Path, run: Run, scenes: list[Sample]):
    """Over three steps, from the weights that checkpoints of the run without an average hold."""
    seen: list[dict[str, torch.Tensor]] = []
    files = Files(checkpoint=tmp_path / "state.pt", seconds=0.0)

    def on_step(step: int, loss: float) -> None:
        if step > 1:
            seen.append(torch.load(tmp_path / "state.pt", weights_only=True)["model"])

    last, plain = run(scenes, steps=3, files=files, on_step=on_step)
    averaged, log = run(scenes, steps=3, ema=0.7)
    assert log.losses == plain.losses
    name = "sem_seg_head.predictor.class_embed.weight"
    expected = 0.7 * (0.7 * seen[0][name] + 0.3 * seen[1][name]) + 0.3 * last[name]
    torch.testing.assert_close(averaged[name], expected)
    assert not torch.equal(averaged[name], last[name])


def test_masks_are_annealed_in_the_course_of_training(scenes: list[Sample]):
    model = build_model("mask2former_tiny", num_classes=10, mask_use="annealed", layers=1, queries=6, width=32)
    assert model.mask_use is not None
    shares = []
    recipe = Recipe(steps=4, batch=2, crop=(64, 64), points=32)
    options = {"classes": 10, "task": "panoptic", "pretrained_backbone": False}
    train(model, scenes, recipe, **options, on_step=lambda step, loss: shares.append(model.mask_use.share))
    assert shares == [1.0, 0.75, 0.5, 0.25]


def test_half_precision_keeps_weights_in_float32(run: Run, scenes: list[Sample]):
    state, log = run(scenes, steps=2, precision="bfloat16")
    _, exact = run(scenes, steps=2)
    assert all(tensor.dtype == torch.float32 for tensor in state.values() if tensor.is_floating_point())
    assert log.losses != exact.losses
    assert log.losses == pytest.approx(exact.losses, rel=0.2)


def test_frozen_norms_keep_all_they_have():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    model.train()
    freeze_norms(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[0].weight.grad is None
    assert model[1].weight.grad is not None


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_divergence_names_arm_step_and_what_to_lower(run: Run, scenes: list[Sample], precision: str):
    with pytest.raises(DivergedError) as caught:
        run(scenes, learning_rate=1e30, precision=precision)
    message = str(caught.value)
    assert message.startswith("emca seed=3: ")
    assert "of 6: training has diverged; try a smaller learning rate than 1e+30, for example 2e+29" in message
    assert ('precision = "float32"' in message) == (precision == "bfloat16")


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_reaches_the_weights(
    run: Run, scenes: list[Sample], monkeypatch: pytest.MonkeyPatch
):
    original = Criterion.total

    def steep(self: Criterion, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        nothing = losses["loss_ce"] - losses["loss_ce"]
        return original(self, losses) + nothing.sqrt()

    monkeypatch.setattr(Criterion, "total", steep)
    with pytest.raises(DivergedError, match=r"the gradient's norm is nan \(loss .*\) at step 1 of 6"):
        run(scenes)


@pytest.mark.parametrize(
    ("error", "batch", "words"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            2,
            "emca seed=3: out of memory at step 1 with batch = 2 at 64x64 in float32; try",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "try batch = 1"),
        (MemoryError(), 1, 'one image does not fit: try a smaller image_size, or precision = "bfloat16"'),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory_suggests_a_batch_size(
    run: Run, scenes: list[Sample], monkeypatch: pytest.MonkeyPatch, error: Exception, batch: int, words: str
):
    def full(self: Criterion, *_: object) -> None:
        raise error

    monkeypatch.setattr(Criterion, "forward", full)
    with pytest.raises(OutOfMemoryError) as caught:
        run(scenes, batch=batch)
    assert words in str(caught.value)


def test_other_errors_pass_as_they_are(run: Run, scenes: list[Sample], monkeypatch: pytest.MonkeyPatch):
    def broken(self: Criterion, *_: object) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(Criterion, "forward", broken)
    with pytest.raises(RuntimeError, match=r"^shapes do not fit$"):
        run(scenes)


def test_images_without_objects_and_crops_without_a_valid_pixel(run: Run, scenes: list[Sample], unlabelled: Unlabelled):
    """Alone in a batch, and beside an image that has some."""
    for samples in ([unlabelled(scenes[0])], [unlabelled(scenes[0]), scenes[1]]):
        state, log = run(samples, steps=3)
        assert np.isfinite(log.losses).all()
        assert all(tensor.isfinite().all() for tensor in state.values())


def test_segments_without_a_pixel_are_no_target(run: Run, scenes: list[Sample]):
    """In the list but not in the map, and a thing that scaling to a few pixels makes vanish."""
    sample = scenes[0]
    listed = replace(sample, segments=(*sample.segments, Segment(id=9999, category=1, thing=True)))
    images, targets = collate([Augmentation((64, 64), scale=(0.05, 0.2))(listed, np.random.default_rng(5))], "panoptic")
    assert 0 < len(targets[0].labels) < len(listed.segments)
    assert targets[0].masks.flatten(1).any(1).all()
    # as they are, without augmentation, an empty mask is a target whose losses are numbers
    [empty] = collate([listed], "panoptic")[1]
    assert not empty.masks[-1].any()
    model = build_model("mask2former_tiny", num_classes=10, queries=6).train()
    losses = Criterion(classes=10, points=32)(model(images[:, :, :64, :64]), [empty])
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert np.isfinite(run([listed], steps=2)[1].losses).all()


def test_a_crop_beside_all_that_is_labelled(run: Run, scenes: list[Sample]):
    """One labelled corner of a large image: most crops have none of it."""
    whole = scenes[0]
    semantic, ids = np.full((400, 400), IGNORE, np.uint8), np.full((400, 400), VOID, np.int32)
    semantic[:8, :8], ids[:8, :8] = 2, 7
    sample = Sample("corner", np.tile(whole.image, (7, 7, 1))[:400, :400], semantic, ids, (Segment(7, 2, False),))
    steps = Steps([sample], Recipe(steps=6, batch=2, crop=(64, 64), seed=3, category_area=0.75), "panoptic")
    counts = [count for step in range(6) for count in steps[step].counts]
    assert 0 in counts
    state, log = run([sample], steps=4, category_area=0.75)
    assert np.isfinite(log.losses).all()
    assert all(tensor.isfinite().all() for tensor in state.values())


class Broken:
    """Images of which the last one cannot be read; importable by a loader process."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        if index == len(self) - 1:
            raise UsageError("cannot decode broken.jpg (10 bytes): image file is truncated; expected a whole image file")
        return self.samples[index]


@pytest.mark.usefixtures("importable_tests")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_in_one_sentence(run: Run, scenes: list[Sample], workers: int):
    """Also where a process of its own reads it; the steps before are done."""
    steps: list[int] = []
    with pytest.raises(UsageError) as caught:
        run(Broken(scenes), steps=6, workers=workers, on_step=lambda step, loss: steps.append(step))
    assert str(caught.value) == "cannot decode broken.jpg (10 bytes): image file is truncated; expected a whole image file"
    assert len(steps) < 3


class Busy(Broken):
    """As Broken, read by a process of which a thread is inside torch whenever it ends."""

    def __getitem__(self, index: int) -> Sample:
        if index == len(self) - 1:
            for _ in range(8):
                threading.Thread(target=self.share, daemon=True).start()
        return super().__getitem__(index)

    def share(self) -> None:
        while True:
            pickle.dumps(torch.ones(1000).share_memory_())


@pytest.mark.usefixtures("importable_tests")
def test_loader_processes_end_without_a_word(run: Run, scenes: list[Sample], capfd: pytest.CaptureFixture[str]):
    with pytest.raises(UsageError, match=r"broken\.jpg"):
        run(Busy(scenes), steps=6, workers=2)
    gc.collect()
    assert capfd.readouterr().err == ""


def test_a_class_that_loader_processes_cannot_import_is_said(monkeypatch: pytest.MonkeyPatch, scenes: list[Sample]):
    """As in a notebook; the images are more than a pipe holds."""
    nowhere = ModuleType("nowhere")
    monkeypatch.setitem(sys.modules, "nowhere", nowhere)
    lost = nowhere.Lost = type("Lost", (Broken,), {"__module__": "nowhere"})
    assert len(pickle.dumps(scenes)) > 2**16
    batches = feed(Steps(lost(scenes), Recipe(steps=2, batch=2, crop=(64, 64)), "panoptic"), start=0, workers=1)
    with pytest.raises(UsageError, match=r"cannot import the data set's class \(No module named 'nowhere'\); expected a class of"):
        next(batches)


def test_a_data_set_that_cannot_be_handed_over_is_said(scenes: list[Sample]):
    samples = Broken(scenes)
    samples.key = lambda: None
    batches = feed(Steps(samples, Recipe(steps=2, batch=2, crop=(64, 64)), "panoptic"), start=0, workers=1)
    with pytest.raises(UsageError, match=r"loader processes cannot be handed the data set \(.*lambda.*loader_workers = 0"):
        next(batches)


def test_a_checkpoint_that_not_all_processes_find_is_refused(tmp_path: Path, run: Run, scenes: list[Sample]):
    files = Files(checkpoint=tmp_path / "state.pt")
    run(scenes, files=files, steps=2)
    one_of_two = SimpleNamespace(
        count=2, rank=1, device=torch.device("cpu"), first=False, wrap=lambda model: model, mean=lambda value: value / 2
    )
    with pytest.raises(UsageError, match="process 1 finds a checkpoint of step 2, others do not"):
        run(scenes, files=files, steps=2, processes=one_of_two)


def test_what_cannot_be_shared_is_refused(run: Run, scenes: list[Sample]):
    three = SimpleNamespace(count=3, rank=0, device=torch.device("cpu"), first=True)
    with pytest.raises(UsageError, match="batch=2 cannot be shared by 3 processes"):
        run(scenes, processes=three)
    with pytest.raises(UsageError, match="there are no training images"):
        run([])


def test_curves_are_written_and_taken_back_to_the_checkpoint(tmp_path: Path, run: Run, scenes: list[Sample]):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, log = run(scenes, steps=3, files=Files(tensorboard=tmp_path / "curves"))
    events = EventAccumulator(str(tmp_path / "curves")).Reload()
    assert {"loss", "loss_ce", "loss_mask", "loss_dice", "gradient_norm", "learning_rate"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(log.losses)
