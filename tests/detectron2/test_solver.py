from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from emca_bench.integrations.detectron2 import build_lr_scheduler, build_optimizer

SEMANTIC = "ade20k/semantic/emca_R50_bs16_160k.yaml"


def test_groups_have_mask2formers_rates_and_decays(tiny: Callable[..., CfgNode]):
    model = build_model(tiny(SEMANTIC))
    optimizer = build_optimizer(tiny(SEMANTIC), model)
    assert isinstance(optimizer, torch.optim.AdamW)
    settings = {parameter: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for parameter in group["params"]}
    assert set(settings) == {parameter for parameter in model.parameters() if parameter.requires_grad}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            rate = 1e-5 if prefix.startswith("backbone") else 1e-4
            plain = isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.SyncBatchNorm, nn.Embedding))
            assert settings[parameter] == (pytest.approx(rate), 0.0 if plain else 0.05), f"{prefix}.{name}"


@pytest.mark.parametrize("kind", ["ADAMW", "SGD"])
def test_the_norm_of_all_gradients_together_is_bounded(kind: str, tiny: Callable[..., CfgNode]):
    model = nn.ModuleDict({"backbone": nn.Linear(3, 4), "head": nn.Linear(4, 2)})
    cfg = tiny(SEMANTIC, {"SOLVER.OPTIMIZER": kind})
    optimizer = build_optimizer(cfg, model)
    for scale, expected in ((100.0, 0.01), (1e-6, None)):
        for parameter in model.parameters():
            parameter.grad = scale * torch.randn_like(parameter)
        before = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        optimizer.step()
        after = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        assert after.norm().item() == pytest.approx(before.norm().item() if expected is None else expected, rel=1e-3)
        assert torch.allclose(after / after.norm(), before / before.norm(), atol=1e-5)


def test_other_clippings_are_detectron2s(tiny: Callable[..., CfgNode]):
    model = nn.Linear(3, 4)
    optimizer = build_optimizer(tiny(SEMANTIC, {"SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "value"}), model)
    model.weight.grad, model.bias.grad = torch.full((4, 3), 5.0), torch.zeros(4)
    optimizer.step()
    assert (model.weight.grad == 0.01).all()


def test_the_rate_falls_as_a_polynomial_without_warm_up(tiny: Callable[..., CfgNode]):
    cfg = tiny(SEMANTIC, {"SOLVER.MAX_ITER": 10})
    optimizer = build_optimizer(cfg, nn.Linear(2, 2))
    schedule = build_lr_scheduler(cfg, optimizer)
    for step in range(10):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4 * (1 - step / 10) ** 0.9)
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
