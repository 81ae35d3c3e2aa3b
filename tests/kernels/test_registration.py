"""What torch knows of the operators: schemas, shapes without values, gradients, compilation, export, FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import emca_kernels  # noqa: F401
import pytest
import torch
from emca_kernels import pool_prototypes, select_prototypes
from emca_kernels.emca_attention.arguments import SELECTIONS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from emca_bench.models import build_attention, build_model


def inputs(pixels: int = 33, queries: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    features, asked = torch.randn(2, pixels, 8, dtype=dtype), torch.randn(2, queries, 8, dtype=dtype)
    return features, asked, torch.rand(2, queries, pixels) < 0.5, torch.randn(2, pixels, 8, dtype=dtype)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("parts", ["all", "least"])
def test_opcheck(backend: str | None, parts: str) -> None:
    features, asked, allowed, position = inputs()
    mask, place = (allowed, position) if parts == "all" else (None, None)
    torch.library.opcheck(torch.ops.emca.select_prototypes.default, (features, asked, mask, None, place, 2, 2, backend))
    torch.library.opcheck(torch.ops.emca.pool_prototypes.default, (features, asked, mask, None, place, 2, backend))
    torch.library.opcheck(torch.ops.emca.pool_prototypes.default, (features, None, allowed, None, place, 1, backend))
    pooled, logsumexp = torch.ops.emca.pool_prototypes(features, asked, mask, None, place, 2, backend)
    arguments = (torch.randn_like(pooled), features, asked, mask, place, pooled, logsumexp)
    torch.library.opcheck(torch.ops.emca.pool_prototypes_backward.default, arguments)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("parts", ["all", "least"])
def test_opcheck_of_the_whole_layer(parts: str, selection: str, backend: str | None) -> None:
    # float64, because opcheck asks for more digits than sums in another order agree on
    features, asked, allowed, position = inputs(dtype=torch.float64)
    mask = allowed if parts == "all" or selection == "mean" else None
    places = (position, torch.randn_like(asked)) if parts == "all" else (None, None)
    shapes = ((8, 8), (8,), (8, 8), (8,), (8, 8), (8,), (8,), (8, 8), (8,))
    parameters = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    scale = torch.tensor(0.5, dtype=torch.float64) if parts == "all" and selection == "softmax" else None
    arguments = (features, asked, mask, None, *places, *parameters, scale, selection, "projected")
    torch.library.opcheck(torch.ops.emca.emca_attention.default, (*arguments, backend))
    updated, rows, kept = torch.ops.emca.emca_attention(*arguments, backend)
    torch.library.opcheck(torch.ops.emca.emca_attention_backward.default, (torch.randn_like(updated), rows, kept, *arguments))


@pytest.mark.parametrize("heads", [1, 2])
def test_gradcheck_of_soft_prototypes(heads: int) -> None:
    features, asked, allowed, position = (tensor.requires_grad_(tensor.is_floating_point()) for tensor in inputs(7, 3, torch.float64))
    allowed[0, 0] = False
    assert torch.autograd.gradcheck(lambda f, q, p: pool_prototypes(f, q, allowed, heads=heads, position=p), (features, asked, position))
    assert torch.autograd.gradcheck(lambda f, p: pool_prototypes(f, None, allowed, heads=heads, position=p), (features, position))


def test_selection_has_no_gradient() -> None:
    features, asked, allowed, position = (tensor.requires_grad_(tensor.is_floating_point()) for tensor in inputs())
    indices, scores = select_prototypes(features, asked, allowed, position=position)
    assert not indices.requires_grad
    assert not scores.requires_grad


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # torch's compiler does so
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["emca", "emca_soft", "mask_pooling"])
def test_attentions_compile_in_one_graph(name: str, dynamic: bool) -> None:
    """Other sizes do not compile again where sizes are dynamic."""
    torch._dynamo.reset()
    module = build_attention(name, width=16)
    compiled: Callable[..., Tensor] = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((12, 20), (9, 31)) if dynamic else ((12, 20),):
        pixels = shape[0] * shape[1]
        given = torch.randn(2, 6, 16), torch.randn(2, 6, 16), torch.randn(2, pixels, 16, requires_grad=True), torch.randn(1, pixels, 16)
        allowed = torch.rand(2, 6, pixels) < 0.5
        outcomes = []
        for call in (module, compiled):
            attended = call(*given, allowed, shape=shape)
            (gradient,) = torch.autograd.grad(attended.square().sum(), given[2])
            outcomes.append((attended, gradient))
        for one, other in zip(*outcomes, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_model_is_exported() -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = build_model("mask2former_tiny", num_classes=3, attention="emca").eval()

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            predictions = self.model(images)
            return predictions.class_logits, predictions.mask_logits

    images = 255 * torch.rand(1, 3, 64, 96)
    module = Logits()
    exported = torch.export.export(module, (images,))
    graphs = [part.graph for part in exported.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    assert any("emca.emca_attention" in str(node.target) for graph in graphs for node in graph.nodes)
    for one, other in zip(exported.module()(images), module(images), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_are_counted_on_every_device(device: str) -> None:
    features, asked, allowed, _ = (tensor.to(device) for tensor in inputs())

    def count(call: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    product = 2 * 2 * 33 * 5 * 8
    assert count(lambda: select_prototypes(features, asked, allowed)) == product
    assert count(lambda: pool_prototypes(features, asked, allowed)) == 2 * product
    assert count(lambda: pool_prototypes(features, None, allowed)) == product
    features.requires_grad_()
    assert count(lambda: pool_prototypes(features, asked, allowed).sum().backward()) == 7 * product
