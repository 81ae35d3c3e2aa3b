"""One process, or those that torchrun started: where each stands, and what they do together."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from emca_bench.errors import UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator


class Processes:
    """The processes of a training, by accelerate where there are several; alone, nothing is imported or wrapped.

    Args:
        device: "cpu" or "cuda"; with several processes each takes the device of its local rank.

    Attributes:
        rank, count: of this process, and how many there are.
        device: of this process.
    """

    def __init__(self, device: str) -> None:
        self._accelerator: Accelerator | None = None
        self.rank, self.count, self.device = 0, 1, torch.device(device)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            try:
                from accelerate import Accelerator, DistributedDataParallelKwargs
            except ImportError:
                raise UsageError("training in several processes needs accelerate: pip install 'emca-bench[train]'") from None
            # not every arm trains all parameters of the decoder
            partly = DistributedDataParallelKwargs(find_unused_parameters=True)
            self._accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=[partly])
            self.rank, self.count = self._accelerator.process_index, self._accelerator.num_processes
            self.device = self._accelerator.device

    @property
    def first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients that are means over the processes; batch norms on CUDA see the joint batch. One model at a time."""
        if self._accelerator is None:
            return model
        # it would keep the models of all trainings before
        self._accelerator.free_memory()
        if self.device.type == "cuda":
            model = with_joint_norms(model)
        return cast(nn.Module, self._accelerator.prepare_model(model))

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a number over the processes."""
        return value if self._accelerator is None else cast(Tensor, self._accelerator.reduce(value, reduction="mean"))

    def wait(self) -> None:
        """Until all processes are here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()

    def end(self) -> None:
        """Leave the group, as the last thing."""
        if self._accelerator is not None:
            self._accelerator.end_training()


def with_joint_norms(model: nn.Module) -> nn.Module:
    """The model with batch norms that see the batches of all processes; timm's keep the activation that is part of them."""
    try:
        from timm.layers import convert_sync_batchnorm
    except ImportError:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return cast(nn.Module, convert_sync_batchnorm(model))
