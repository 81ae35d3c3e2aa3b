"""PEM-CA as PEM's code computes it, written from its description."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from emca_bench.models import build_attention

WIDTH, SHAPE, QUERIES, HEADS = 32, (4, 5), 6, 8


class PemCA(nn.Module):
    """Layers under PEM's names; layouts of images [B, C, H, W], masks as logits [B, Q, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(WIDTH)
        self.to_query_3x3 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.query_norm = nn.LayerNorm(WIDTH)
        self.query_proj = nn.Linear(WIDTH, WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.final = nn.Linear(WIDTH, WIDTH)
        self.alpha = nn.Parameter(torch.ones(1, 1, WIDTH))

    def forward(self, target: Tensor, memory: Tensor, mask_logits: Tensor | None, pos: Tensor, query_pos: Tensor) -> Tensor:
        batch = len(target)
        keys = self.out(self.to_query_3x3(self.bn(memory + pos)).flatten(2).transpose(1, 2))
        asked = self.query_proj(self.query_norm(target + query_pos))
        keys = keys / keys.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        asked = asked / asked.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        keys_BhPd = keys.view(batch, -1, HEADS, WIDTH // HEADS).transpose(1, 2)
        asked_BhQd = asked.view(batch, QUERIES, HEADS, WIDTH // HEADS).transpose(1, 2)
        similarity = keys_BhPd @ asked_BhQd.transpose(2, 3)
        if mask_logits is not None:
            blocked_BPQ = (mask_logits < 0).flatten(2).transpose(1, 2)
            # the reset looks at all queries of the image at once
            blocked_BPQ = blocked_BPQ & ~blocked_BPQ.flatten(1).all(1)[:, None, None]
            similarity = similarity.masked_fill(blocked_BPQ[:, None], -torch.inf)
        best_BhQ = similarity.argmax(2)
        chosen = keys_BhPd.gather(2, best_BhQ[..., None].expand(-1, -1, -1, WIDTH // HEADS))
        prototypes = chosen.permute(0, 2, 1, 3).reshape(batch, QUERIES, WIDTH)
        product = nn.functional.normalize(self.proj(prototypes * asked), dim=1)
        return self.final(product * self.alpha + prototypes) + target


NAMES = {
    "bn": "local_conv.norm",
    "to_query_3x3": "local_conv.conv",
    "out": "key_projection",
    "query_norm": "query_norm",
    "query_proj": "query_projection",
    "proj": "product_projection",
    "final": "out_projection",
    "alpha": "alpha",
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masks", ["none", "random", "some empty", "all empty"])
def test_values_and_gradients_are_pem_s(masks: str, training: bool) -> None:
    theirs = PemCA().double().train(training)
    nn.init.normal_(theirs.alpha)
    theirs.bn.running_mean.normal_()  # type: ignore[union-attr]
    theirs.bn.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    ours = build_attention("pem_ca", width=WIDTH).double().train(training)
    state = {}
    for name, tensor in theirs.state_dict().items():
        layer, _, rest = name.partition(".")
        state[f"{NAMES[layer]}.{rest}" if rest else NAMES[layer]] = tensor.flatten() if layer == "alpha" else tensor
    ours.load_state_dict(state)

    target, query_pos = torch.randn(2, 3, QUERIES, WIDTH, dtype=torch.float64)
    memory, pos = torch.randn(2, 3, WIDTH, *SHAPE, dtype=torch.float64)
    logits = torch.randn(3, QUERIES, *SHAPE)
    if masks == "some empty":
        logits[:, ::2] = -1
    elif masks == "all empty":
        logits[1] = -1
    outcomes = []
    for module in (theirs, ours):
        given = [tensor.clone().requires_grad_() for tensor in (target, memory, query_pos, pos)]
        if module is theirs:
            attended = module(given[0], given[1], None if masks == "none" else logits, given[3], given[2])
        else:
            allowed = None if masks == "none" else (logits >= 0).flatten(2)
            attended = module(given[0], given[2], given[1].flatten(2).mT, given[3].flatten(2).mT, allowed, shape=SHAPE)
        (attended * attended.detach().sin()).sum().backward()
        outcomes.append([attended, *(tensor.grad for tensor in given)])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_267008_parameters_a_layer() -> None:
    assert sum(parameter.numel() for parameter in build_attention("pem_ca").parameters()) == 267_008


def test_heads_choose_their_own_pixels() -> None:
    module = build_attention("pem_ca", width=WIDTH, local_conv=False).double()
    features = torch.randn(1, 400, WIDTH, dtype=torch.float64, requires_grad=True)
    module(torch.randn(1, 1, WIDTH, dtype=torch.float64), None, features, None, None, shape=(20, 20)).sum().backward()
    assert features.grad is not None
    assert 1 < features.grad[0].any(-1).sum() <= HEADS
