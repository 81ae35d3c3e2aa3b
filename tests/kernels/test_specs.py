"""What operators cost by their specification, against sums done by hand, torch's counter and the tensors themselves."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from emca_kernels import (
    Projections,
    deformable_attention,
    deformable_attention_from_offsets,
    emca_attention,
    pool_prototypes,
    select_prototypes,
    specs,
)
from emca_kernels.specs import (
    DEFORMABLE_ATTENTION,
    DEFORMABLE_ATTENTION_FROM_OFFSETS,
    EMCA_ATTENTION,
    FORWARD,
    FORWARD_BACKWARD,
    POOL_PROTOTYPES,
    SCORES,
    SELECT_PROTOTYPES,
    SPECS,
    OpSpec,
    Sizes,
)
from torch.utils.flop_counter import FlopCounterMode

SMALL = Sizes(batch=2, pixels=10, queries=3, width=4)


def tensors(sizes: Sizes, dtype: torch.dtype) -> dict[str, Any]:
    features, queries = (torch.randn(sizes.batch, rows, sizes.width, dtype=dtype) for rows in (sizes.pixels, sizes.queries))
    allowed = torch.rand(sizes.batch, sizes.queries, sizes.pixels) < 0.5
    return {"features": features, "queries": queries} | ({"allowed": allowed} if sizes.masked else {})


def test_sums_by_hand() -> None:
    """2 images, 10 pixels, 3 queries, 4 channels of float32: features 320 bytes, queries 96, mask 60."""
    assert SELECT_PROTOTYPES.flops(SMALL) == 2 * 2 * 10 * 3 * 4
    assert SELECT_PROTOTYPES.bytes(SMALL) == 320 + 96 + 60 + 6 * (8 + 4)
    assert SCORES.bytes(SMALL) == 320 + 96 + 60 + 240
    assert POOL_PROTOTYPES.flops(SMALL) == 2 * 480
    forward = 320 + 96 + 60 + 96 + 24
    assert POOL_PROTOTYPES.bytes(SMALL) == forward
    assert POOL_PROTOTYPES.flops(SMALL, FORWARD_BACKWARD) == 7 * 480
    assert POOL_PROTOTYPES.bytes(SMALL, FORWARD_BACKWARD) == 2 * forward + 96 + 320 + 96


def test_half_the_element_halves_features_but_neither_mask_nor_indices() -> None:
    half = Sizes(batch=2, pixels=10, queries=3, width=4, itemsize=2, masked=False)
    assert SELECT_PROTOTYPES.bytes(half) == 160 + 48 + 6 * (8 + 2)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("spec", "operator"), [(SELECT_PROTOTYPES, select_prototypes), (POOL_PROTOTYPES, pool_prototypes)])
def test_bytes_are_those_of_the_tensors(spec: OpSpec, operator: Any, dtype: torch.dtype, masked: bool) -> None:
    sizes = Sizes(batch=2, pixels=37, queries=5, width=8, itemsize=dtype.itemsize, masked=masked)
    given = tensors(sizes, dtype)
    assert {name: array.shape for name, array in spec.arguments(sizes).items()} == {name: tuple(t.shape) for name, t in given.items()}
    assert sum(array.nbytes for array in spec.arguments(sizes).values()) == sum(tensor.nbytes for tensor in given.values())
    results = operator(*given.values(), backend="reference")
    results = results if isinstance(results, tuple) else (results,)
    promised = list(spec.results(sizes).values())[: len(results)]
    assert [array.nbytes for array in promised] == [result.nbytes for result in results]


def test_flops_are_those_that_torch_counts() -> None:
    sizes = Sizes(batch=2, pixels=37, queries=5, width=8)
    given = tensors(sizes, torch.float32)
    with FlopCounterMode(display=False) as counter:
        select_prototypes(*given.values())
    assert counter.get_total_flops() == SELECT_PROTOTYPES.flops(sizes)
    with FlopCounterMode(display=False) as counter:
        pooled = pool_prototypes(given["features"].requires_grad_(), given["queries"].requires_grad_(), given["allowed"])
        assert counter.get_total_flops() == POOL_PROTOTYPES.flops(sizes, FORWARD)
        pooled.sum().backward()
    assert counter.get_total_flops() == POOL_PROTOTYPES.flops(sizes, FORWARD_BACKWARD)


def test_flops_of_the_layer_are_those_that_torch_counts() -> None:
    """The sum over queries that share a pixel is what an implementation does beyond the specification."""
    sizes = Sizes(batch=2, pixels=37, queries=5, width=8)
    given = {name: tensor.requires_grad_(tensor.is_floating_point()) for name, tensor in tensors(sizes, torch.float32).items()}
    parameters = [torch.randn(array.shape, requires_grad=True) for array in EMCA_ATTENTION.parameters(sizes).values()]
    with FlopCounterMode(display=False) as counter:
        attended = emca_attention(*given.values(), Projections(*parameters))
        assert counter.get_total_flops() == EMCA_ATTENTION.flops(sizes, FORWARD)
        attended.sum().backward()
    assert counter.get_total_flops() == EMCA_ATTENTION.flops(sizes, FORWARD_BACKWARD) + 2 * 2 * 5 * 5 * 8


def test_bytes_of_the_layer_by_hand() -> None:
    """Four matrices and five vectors of 4 channels: 336 bytes; updated queries and rows 96 each, indices 48."""
    assert EMCA_ATTENTION.bytes(SMALL) == 320 + 96 + 60 + 4 * 64 + 5 * 16 + 96 + 96 + 48


def test_a_choice_has_no_backward_pass() -> None:
    for cost in (SELECT_PROTOTYPES.flops, SELECT_PROTOTYPES.bytes):
        with pytest.raises(ValueError, match="select_prototypes has no pass 'forward_backward'; its passes: forward"):
            cost(SMALL, FORWARD_BACKWARD)


def test_every_spec_has_a_tolerance_for_every_dtype() -> None:
    assert all(set(spec.tolerance) == {"float64", "float32", "bfloat16", "float16"} for spec in SPECS.values())


def test_specifications_need_no_torch() -> None:
    source = Path(specs.__file__).read_text()
    imported = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"__future__", "math", "collections.abc", "dataclasses"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deformable_attention_costs_what_its_tensors_and_the_counter_say(dtype: torch.dtype) -> None:
    """One level of 2x5 pixels, 7 queries, 3 heads of 4 channels, 6 samples each."""
    sizes = Sizes(batch=2, pixels=10, queries=7, width=12, itemsize=dtype.itemsize, heads=3, samples=6)
    value, offsets, logits = (torch.randn(shape).to(dtype) for shape in ((2, 10, 3, 4), (2, 7, 3, 1, 6, 2), (2, 7, 3, 1, 6)))
    points = torch.rand(7, 2)
    forms: list[tuple[OpSpec, Any, list[torch.Tensor]]] = [
        (DEFORMABLE_ATTENTION, deformable_attention, [offsets, logits]),
        (DEFORMABLE_ATTENTION_FROM_OFFSETS, deformable_attention_from_offsets, [points, offsets, logits]),
    ]
    for spec, operator, given in forms:
        leaf = value.clone().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            result = operator(leaf, [(2, 5)], *given)
            forward = counter.get_total_flops()
            result.sum().backward()
        assert forward == spec.flops(sizes)
        assert counter.get_total_flops() == spec.flops(sizes, FORWARD_BACKWARD)
        assert spec.bytes(sizes) == sum(tensor.nbytes for tensor in (value, *given, result))
