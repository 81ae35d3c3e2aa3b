"""PEM-CA as PEM's code computes it and as it was meant, written from its description."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from emca_bench.models import build_attention

WIDTH, SHAPE, QUERIES, HEADS = 32, (4, 5), 6, 8


class PemCA(nn.Module):
    """Layers under PEM's names; layouts of images [B, C, H, W], masks as logits [B, Q, H, W].

    `mended`: the norm of the product is over the channels of a query, and a query with an empty mask looks everywhere.
    """

    def __init__(self, *, mended: bool) -> None:
        super().__init__()
        self.mended = mended
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
            # the code's reset looks at all queries of the image at once
            empty = blocked_BPQ.all(1, keepdim=True) if self.mended else blocked_BPQ.flatten(1).all(1)[:, None, None]
            blocked_BPQ = blocked_BPQ & ~empty
            similarity = similarity.masked_fill(blocked_BPQ[:, None], -torch.inf)
        best_BhQ = similarity.argmax(2)
        chosen = keys_BhPd.gather(2, best_BhQ[..., None].expand(-1, -1, -1, WIDTH // HEADS))
        prototypes = chosen.permute(0, 2, 1, 3).reshape(batch, QUERIES, WIDTH)
        product = nn.functional.normalize(self.proj(prototypes * asked), dim=2 if self.mended else 1)
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
@pytest.mark.parametrize("name", ["pem_ca", "pem_ca_published"])
def test_values_and_gradients_are_pem_s(name: str, masks: str, training: bool) -> None:
    theirs = PemCA(mended=name == "pem_ca").double().train(training)
    nn.init.normal_(theirs.alpha)
    theirs.bn.running_mean.normal_()  # type: ignore[union-attr]
    theirs.bn.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    ours = build_attention(name, width=WIDTH).double().train(training)
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


@pytest.mark.parametrize("name", ["pem_ca", "pem_ca_published"])
def test_267008_parameters_a_layer(name: str) -> None:
    assert sum(parameter.numel() for parameter in build_attention(name).parameters()) == 267_008


def attend(name: str, allowed: Tensor | None, queries: Tensor, features: Tensor, **switches: str) -> Tensor:
    """A module with the same weights whatever its switches; no local convolution, so that pixels stay apart."""
    torch.manual_seed(7)
    module = build_attention(name, width=WIDTH, local_conv=False, **switches).double()
    nn.init.normal_(module.alpha)
    return module(queries, None, features, None, allowed, shape=SHAPE)


def make_inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, QUERIES, WIDTH, dtype=torch.float64), torch.randn(2, SHAPE[0] * SHAPE[1], WIDTH, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "switches", "coupled"),
    [
        ("pem_ca", {}, False),
        ("pem_ca", {"norm_axis": "queries"}, True),
        ("pem_ca_published", {}, True),
        ("pem_ca_published", {"norm_axis": "row"}, False),
    ],
)
def test_only_the_norm_over_queries_lets_one_query_move_the_others(name: str, switches: dict[str, str], coupled: bool) -> None:
    queries, features = make_inputs()
    before = attend(name, None, queries, features, **switches)
    queries[:, 2] += torch.randn(WIDTH, dtype=torch.float64)
    moved = (attend(name, None, queries, features, **switches) - before).abs().amax(-1)
    assert (moved[:, 2] > 1e-6).all()
    others = moved[:, [0, 1, 3, 4, 5]]
    assert (others > 1e-6).all() if coupled else (others < 1e-12).all()


def test_with_the_norm_over_queries_a_query_depends_on_how_many_there_are() -> None:
    queries, features = make_inputs()
    for name, depends in (("pem_ca", False), ("pem_ca_published", True)):
        apart = attend(name, None, queries, features)[:, :3] - attend(name, None, queries[:, :3], features)
        assert bool(apart.abs().amax() > 1e-6) is depends


@pytest.mark.parametrize(
    ("name", "switches", "first_pixel"),
    [
        ("pem_ca", {}, False),
        ("pem_ca", {"empty_mask": "first_pixel"}, True),
        ("pem_ca_published", {}, True),
        ("pem_ca_published", {"empty_mask": "everywhere"}, False),
    ],
)
def test_an_empty_mask_means_everywhere_or_under_its_switch_the_first_pixel(name: str, switches: dict[str, str], first_pixel: bool) -> None:
    queries, features = make_inputs()
    allowed = torch.rand(2, QUERIES, SHAPE[0] * SHAPE[1]) < 0.5
    allowed[..., 3] = True
    everywhere, first = allowed.clone(), allowed.clone()
    everywhere[:, 1] = True
    first[:, 1] = False
    first[:, 1, 0] = True
    allowed[:, 1] = False
    found, looks_everywhere, looks_at_first = (attend(name, mask, queries, features, **switches) for mask in (allowed, everywhere, first))
    torch.testing.assert_close(found, looks_at_first if first_pixel else looks_everywhere)
    assert ((found - (looks_everywhere if first_pixel else looks_at_first))[:, 1].abs().amax(-1) > 1e-6).all()


def test_where_all_masks_of_an_image_are_empty_both_rules_look_everywhere() -> None:
    queries, features = make_inputs()
    allowed = torch.rand(2, QUERIES, SHAPE[0] * SHAPE[1]) < 0.5
    allowed[1] = False
    for name in ("pem_ca", "pem_ca_published"):
        torch.testing.assert_close(attend(name, allowed, queries, features)[1], attend(name, None, queries, features)[1])


def test_heads_choose_their_own_pixels() -> None:
    module = build_attention("pem_ca", width=WIDTH, local_conv=False).double()
    features = torch.randn(1, 400, WIDTH, dtype=torch.float64, requires_grad=True)
    module(torch.randn(1, 1, WIDTH, dtype=torch.float64), None, features, None, None, shape=(20, 20)).sum().backward()
    assert features.grad is not None
    assert 1 < features.grad[0].any(-1).sum() <= HEADS
