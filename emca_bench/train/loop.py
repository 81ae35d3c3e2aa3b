"""The training loop. A step depends on the state before it, the seed and its number: a run goes on where it stopped, bit by bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from emca_bench.errors import UsageError
from emca_bench.models.criterion import Criterion
from emca_bench.models.mask2former import Mask2Former
from emca_bench.models.matcher import DivergedError
from emca_bench.models.selection_loss import keep_scores, selection_loss
from emca_bench.train.feed import Batch, Samples, Steps, feed
from emca_bench.train.processes import Processes
from emca_bench.train.recipe import Recipe, freeze_norms, make_optimizer
from emca_bench.train.state import load_state, save_state
from emca_bench.train.trouble import explained

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@dataclass
class TrainingLog:
    """What a training run leaves beside the weights.

    Attributes:
        losses: total loss of every step.
        seconds: wall time of all steps, those before an interrupt included.
        waiting_seconds: of these, until a batch was there.
        loading_seconds: what making the batches took, in whatever process.
        resumed_at: the step that this call began at, 0 for a run from the start.
    """

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    waiting_seconds: float = 0.0
    loading_seconds: float = 0.0
    resumed_at: int = 0


@dataclass(frozen=True, kw_only=True)
class Files:
    """Where a training keeps its state and its curves, and how it goes on.

    Attributes:
        checkpoint: file of the state; None keeps none.
        seconds: time between two checkpoints; one is written at the end in any case.
        identity: of model and data; a checkpoint of another one is refused.
        tensorboard: folder for event files, or None.
    """

    checkpoint: Path | None = None
    seconds: float = 60.0
    identity: Mapping[str, Any] = field(default_factory=dict)
    tensorboard: Path | None = None


def train(
    model: Mask2Former,
    samples: Samples,
    recipe: Recipe,
    *,
    classes: int,
    task: str,
    pretrained_backbone: bool,
    label: str = "training",
    workers: int = 0,
    files: Files | None = None,
    processes: Processes | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> TrainingLog:
    """Train a model in place; with `recipe.ema`, its weights are the averaged ones in the end.

    Args:
        model: on the device where it shall be trained.
        samples: training images with truth.
        recipe: numbers of the run.
        classes: without "no object".
        task: "semantic" or "panoptic": what the segments are.
        pretrained_backbone: trains the backbone at its own rate.
        label: names the run in errors.
        workers: processes that make batches ahead of time; 0 makes them in this one.
        files: where to keep state and curves; a state that is there is gone on with.
        processes: of a distributed training; each takes its share of every batch.
        on_step: called after each step with the number of steps done and the total loss.

    Raises:
        DivergedError, OutOfMemoryError: see `trouble`.
        CheckpointWriteError: a checkpoint could not be written; the one before it is there.
        UsageError: a checkpoint of another configuration, or one that not all processes find; a batch that they cannot share.
    """
    files = files or Files()
    processes = processes or Processes(next(model.parameters()).device.type)
    if recipe.batch % processes.count:
        raise UsageError(f"batch={recipe.batch} cannot be shared by {processes.count} processes; expected a multiple of their number")
    if not len(samples):
        raise UsageError(f"{label}: there are no training images; expected at least 1")
    run = Trainer(model, recipe, Criterion(classes=classes, points=recipe.points), processes, pretrained_backbone=pretrained_backbone)
    identity = {"recipe": asdict(recipe), **files.identity}
    run.restore(None if files.checkpoint is None else load_state(files.checkpoint, identity))
    if processes.mean(torch.tensor(float(run.step), device=processes.device)).item() != run.step:
        raise UsageError(
            f"process {processes.rank} finds a checkpoint of step {run.step}, others do not; expected a folder that all can read"
        )
    log = run.log
    steps = Steps(samples, recipe, task, rank=processes.rank, processes=processes.count)
    batches = feed(steps, start=run.step, workers=workers)
    curves = _writer(files.tensorboard, run.step) if files.tensorboard is not None and processes.first else None
    saved = time.monotonic()
    for step in range(run.step + 1, recipe.steps + 1):
        started = time.perf_counter()
        batch = next(batches)
        log.waiting_seconds += time.perf_counter() - started
        log.loading_seconds += batch.seconds
        with explained(label, step, recipe):
            losses = run.do(batch)
        log.seconds += time.perf_counter() - started
        if curves is not None:
            for name, value in losses.items():
                curves.add_scalar(name, value, step)
        on_step(step, log.losses[-1])
        due = step == recipe.steps or time.monotonic() - saved >= files.seconds
        if due and files.checkpoint is not None and processes.first:
            save_state(files.checkpoint, run.state(), identity)
            saved = time.monotonic()
    if curves is not None:
        curves.close()
    run.finish()
    processes.wait()
    return log


class Trainer:
    """Model, optimiser and average, and one step of them."""

    def __init__(
        self, model: Mask2Former, recipe: Recipe, criterion: Criterion, processes: Processes, *, pretrained_backbone: bool
    ) -> None:
        self.model, self.recipe, self.processes = model, recipe, processes
        self.criterion = criterion.to(processes.device)
        if recipe.frozen_norms:
            freeze_norms(model)
        self.optimizer = make_optimizer(model, recipe, pretrained_backbone=pretrained_backbone)
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.average: AveragedModel | None = None
        if recipe.ema:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True)
        self.step, self.log = 0, TrainingLog()
        model.train()
        if recipe.frozen_norms:
            freeze_norms(model)
        if recipe.selection_weight:
            keep_scores(model)
        self.wrapped = processes.wrap(model)

    def state(self) -> dict[str, Any]:
        """All that the next step depends on."""
        averaged = {} if self.average is None else {"average": self.average.state_dict()}
        state = {"step": self.step, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "log": asdict(self.log)}
        return {**state, **averaged}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a state; None begins."""
        if state is None:
            return
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.log = TrainingLog(**{**state["log"], "resumed_at": self.step})

    def do(self, batch: Batch) -> dict[str, float]:
        """One step; what curves show of it."""
        recipe = self.recipe
        # what a step draws depends on its number alone: not on the steps before it, nor on what an arm drew in them
        torch.manual_seed(step_seed(recipe.seed, self.step, self.processes.rank))
        if self.model.mask_use is not None:
            self.model.mask_use.share = 1 - self.step / recipe.steps
        share = recipe.rate(self.step)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * share
        images, targets = batch.on(self.processes.device)
        with self._autocast():
            predictions = self.wrapped(images)
        chosen = self.criterion.choose(predictions, targets)
        losses = self.criterion(predictions, targets, chosen)
        total = self.criterion.total(losses)
        # what is recorded is what all arms minimise, so that their curves compare
        loss = self.processes.mean(total.detach()).item()
        if recipe.selection_weight:
            earlier = [each.matches for each in chosen[1:]]
            missed = selection_loss(self.model, earlier, targets, over_processes=self.processes.mean)
            total = total + recipe.selection_weight * missed
        if not np.isfinite(loss):
            raise DivergedError(f"loss is {loss}")
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = nn.utils.clip_grad_norm_(self.trained, recipe.clip_norm).item()
        if not np.isfinite(norm):
            raise DivergedError(f"the gradient's norm is {norm} (loss {loss:.4g})")
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.step += 1
        self.log.losses.append(loss)
        last = {name: float(losses[name].detach()) for name in self.criterion.weights}
        return {"loss": loss, **last, "gradient_norm": norm, "learning_rate": self.recipe.learning_rate * share}

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.recipe.precision == "float32":
            return nullcontext()
        return torch.autocast(self.processes.device.type, dtype=torch.bfloat16)

    def finish(self) -> None:
        """Leave the averaged weights in the model, which is watched no more."""
        if self.recipe.selection_weight:
            keep_scores(self.model, False)
        if self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of what a process draws in a step."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _writer(folder: Path, step: int) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("curves for TensorBoard need the package: pip install 'emca-bench[train]'") from None
    # what an interrupted run wrote beyond its last checkpoint is taken back
    return SummaryWriter(str(folder), purge_step=step + 1)
