"""Closed forms of the multiply-adds against torch's counter on the meta device, and against the published figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from emca_bench.models import ATTENTIONS, build_attention

QUERIES, WIDTH = 100, 256

SWITCHES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ATTENTIONS),
    *(("emca", {"folded": folded, "heads": heads}) for folded in (True, False) for heads in (1, 2, 8)),
    *(
        ("emca", {"folded": folded, "selection": selection, "heads": heads})
        for folded in (True, False)
        for selection in ("random", "mean", "softmax")
        for heads in (1, 4)
    ),
    *(
        ("emca", {"folded": folded, "selection": selection, "prototypes": 4})
        for folded in (True, False)
        for selection in ("topk_mean", "topk_softmax", "random")
    ),
    *(
        ("emca", {"folded": folded, "selection": "pool_and_prototype", "heads": heads, "selection_gradient": gradient})
        for folded in (True, False)
        for heads in (1, 4)
        for gradient in ("none", "straight_through")
    ),
    *(
        ("emca", {"selection": selection, "heads": 8, "head_split": "features"})
        for selection in ("argmax", "random", "mean", "softmax", "pool_and_prototype")
    ),
    ("emca", {"alpha": "zero"}),
    ("emca", {"alpha": "one", "norm_axis": "none"}),
    ("emca", {"product": "plain"}),
    ("emca", {"selection_gradient": "straight_through"}),
    ("emca_soft", {"heads": 4, "head_split": "features", "temperature": "per_head"}),
    ("emca", {"local_conv": True}),
    ("emca", {"local_conv": True, "folded": False}),
    ("emca", {"normalize_keys": True}),
    ("emca", {"query_norm": True, "residual": "raw", "norm_axis": "queries", "empty_mask": "first_pixel", "positions": False}),
    ("emca_soft", {"heads": 8}),
    ("emca_soft", {"folded": False}),
    ("mask_pooling", {"heads": 8}),
    ("mask_pooling", {"folded": False}),
    ("pem_ca", {"local_conv": False, "heads": 1}),
]


def counted_macs(name: str, shape: tuple[int, int], **switches: Any) -> int:
    pixels = shape[0] * shape[1]
    with torch.device("meta"):
        module = build_attention(name, width=WIDTH, **switches).eval()
        queries, features = torch.empty(1, QUERIES, WIDTH), torch.empty(1, pixels, WIDTH)
        allowed = torch.empty(1, QUERIES, pixels, dtype=torch.bool)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(queries, queries, features, features, allowed, shape=shape)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("shape", [(64, 64), (8, 17)])
@pytest.mark.parametrize(("name", "switches"), SWITCHES)
def test_closed_forms_are_what_torch_counts(name: str, switches: dict[str, Any], shape: tuple[int, int]) -> None:
    closed = build_attention(name, width=WIDTH, **switches).macs(pixels=shape[0] * shape[1], queries=QUERIES)
    assert closed == pytest.approx(counted_macs(name, shape, **switches), rel=0.005)


@pytest.mark.parametrize("name", ["masked", "masked_fused"])
def test_both_baselines_are_counted_alike(name: str) -> None:
    assert counted_macs(name, (64, 64)) == pytest.approx(759.7e6, rel=0.005)


@pytest.mark.parametrize(
    ("name", "switches", "macs_a_pixel"),
    [
        ("masked", {}, 182_272),
        ("masked_fused", {}, 182_272),
        ("emca", {"folded": False}, 91_136),
        ("emca", {}, 25_600),
        ("emca_soft", {}, 51_200),
        ("mask_pooling", {}, 25_600),
        ("mask_mean", {}, 25_600),
        ("emca", {"selection": "pool_and_prototype"}, 51_200),
        ("emca", {"heads": 8, "head_split": "features"}, 25_600),
        ("emca_soft", {"heads": 8, "head_split": "features"}, 51_200),
        ("pem_ca", {}, 93_440),
        ("pem_ca_published", {}, 93_440),
        ("none", {}, 0),
    ],
)
def test_multiply_adds_a_pixel_are_those_of_the_definition(name: str, switches: dict[str, Any], macs_a_pixel: int) -> None:
    module = build_attention(name, width=WIDTH, **switches)
    assert module.macs(pixels=2000, queries=QUERIES) - module.macs(pixels=1000, queries=QUERIES) == 1000 * macs_a_pixel


@pytest.mark.parametrize(
    ("name", "switches", "size", "gmacs"),
    [
        ("masked", {}, (512, 512), 3.06),
        ("emca", {"folded": False}, (512, 512), 1.65),
        ("emca", {}, (512, 512), 0.71),
        ("masked", {}, (1024, 2048), 23.6),
        ("emca", {"folded": False}, (1024, 2048), 11.9),
        ("emca", {}, (1024, 2048), 3.6),
    ],
)
def test_nine_layers_cost_what_the_definition_quotes(name: str, switches: dict[str, Any], size: tuple[int, int], gmacs: float) -> None:
    module = build_attention(name, width=WIDTH, **switches)
    levels = [size[0] // stride * (size[1] // stride) for stride in (32, 16, 8)]
    total = 3 * sum(module.macs(pixels=pixels, queries=QUERIES) for pixels in levels)
    assert total / 1e9 == pytest.approx(gmacs, rel=0.01)
