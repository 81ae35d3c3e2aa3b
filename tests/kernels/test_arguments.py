"""What a wrong argument is told: its name, what was found and what was expected."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from emca_kernels import (
    attend_prototypes,
    checks,
    deformable_attention,
    deformable_attention_from_offsets,
    deformable_conv,
    pool_prototypes,
    select_prototypes,
)
from torch import Tensor


def features(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape or (2, 7, 8), dtype=dtype)


def queries(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape or (2, 3, 8), dtype=dtype)


def mask(*shape: int, dtype: torch.dtype = torch.bool) -> Tensor:
    return torch.zeros(shape or (2, 3, 7), dtype=dtype)


ALLOWED = "allowed must be a bool tensor [B, Q, P], True = may be chosen; found"


@pytest.mark.parametrize("operator", [select_prototypes, pool_prototypes])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": features(7, 8)}, ValueError, "features has shape [7, 8], expected [B, P, C]"),
        ({"queries": queries(3, 8)}, ValueError, "queries has shape [3, 8], expected [B=2, Q, C=8]"),
        ({"queries": queries(2, 3, 6)}, ValueError, "queries has shape [2, 3, 6], expected [B=2, Q, C=8]"),
        ({"queries": queries(1, 3, 8)}, ValueError, "queries has shape [1, 3, 8], expected [B=2, Q, C=8]"),
        ({"features": features(dtype=torch.int64)}, TypeError, "features must be floating point, found torch.int64"),
        ({"queries": queries(dtype=torch.bool)}, TypeError, "queries must be floating point, found torch.bool"),
        ({"queries": [[0.0]]}, TypeError, "queries must be a tensor [B, Q, C], found list"),
        ({"queries": queries().double()}, TypeError, "queries is torch.float64, features torch.float32: expected the same dtype"),
        ({"queries": queries().to("meta")}, ValueError, "queries is on meta, features on cpu: expected the same device"),
        ({"allowed": mask(2, 7, 3)}, ValueError, "allowed has shape [2, 7, 3], expected [B=2, Q=3, P=7]"),
        ({"allowed": mask(3, 7)}, ValueError, "allowed has shape [3, 7], expected [B=2, Q=3, P=7]"),
        ({"allowed": mask(dtype=torch.uint8)}, TypeError, f"{ALLOWED} torch.uint8"),
        ({"allowed": True}, TypeError, f"{ALLOWED} bool"),
        ({"heads": 3}, ValueError, "heads=3 must divide C=8"),
        ({"heads": 0}, ValueError, "heads=0 must divide C=8"),
        ({"backend": "cudnn"}, ValueError, "backend='cudnn' is no backend of OPERATOR; known: "),
    ],
)
def test_pixels_and_queries(operator: Callable[..., Any], changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message.replace("OPERATOR", operator.__name__))):
        operator(**{"features": features(), "queries": queries(), **changes})


@pytest.mark.parametrize("k", [0, -1, 8])
def test_k_must_fit_the_pixels(k: int) -> None:
    with pytest.raises(ValueError, match=re.escape(f"k={k} prototypes from P=7 pixels: expected 1 <= k <= P")):
        select_prototypes(features(), queries(), k=k)


def test_more_pixels_than_a_packed_index_holds() -> None:
    with pytest.raises(ValueError, match=f"P={1 << 30} pixels, expected fewer than {1 << 30}"):
        select_prototypes(torch.empty(1, 1 << 30, 1, device="meta"), torch.empty(1, 1, 1, device="meta"))


ATTEND = {
    "prototypes": (2, 3, 8),
    "queries": (2, 3, 8),
    "product_weight": (8, 8),
    "product_bias": (8,),
    "alpha": (8,),
    "out_weight": (6, 8),
    "out_bias": (6,),
}


@pytest.mark.parametrize(
    ("argument", "shape", "expected"),
    [
        ("prototypes", (2, 8), "[B, Q, D]"),
        ("queries", (2, 4, 8), "[B=2, Q=3, D=8]"),
        ("product_weight", (6, 8), "[E=8, D=8]"),
        ("product_bias", (1, 8), "[D=8]"),
        ("alpha", (7,), "[D=8]"),
        ("out_weight", (8, 6), "[C, D=8]"),
        ("out_bias", (8,), "[C=6]"),
    ],
)
def test_shapes_of_the_element_wise_attention(argument: str, shape: tuple[int, ...], expected: str) -> None:
    tensors: dict[str, Any] = {name: torch.zeros(wanted) for name, wanted in {**ATTEND, argument: shape}.items()}
    with pytest.raises(ValueError, match=re.escape(f"{argument} has shape {list(shape)}, expected {expected}")):
        attend_prototypes(**tensors)


@pytest.mark.parametrize("argument", ATTEND)
def test_the_element_wise_attention_is_of_floating_point_tensors(argument: str) -> None:
    tensors: dict[str, Any] = {
        name: torch.zeros(shape, dtype=torch.int32 if name == argument else torch.float32) for name, shape in ATTEND.items()
    }
    with pytest.raises(TypeError, match=f"{argument} must be floating point, found torch.int32"):
        attend_prototypes(**tensors)


def test_the_element_wise_attention_names_a_wrong_axis_and_backend() -> None:
    tensors: dict[str, Any] = {name: torch.zeros(shape) for name, shape in ATTEND.items()}
    with pytest.raises(ValueError, match="norm_axis='column', expected one of row, queries, none"):
        attend_prototypes(**tensors, norm_axis="column")
    with pytest.raises(ValueError, match="backend='cudnn' is no backend of attend_prototypes"):
        attend_prototypes(**tensors, backend="cudnn")
    with pytest.raises(TypeError, match=r"queries is torch\.float64, prototypes torch\.float32"):
        attend_prototypes(**{**tensors, "queries": tensors["queries"].double()})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"value": torch.zeros(2, 6, 2, 3)}, ValueError, "value has shape [2, 6, 2, 3], expected [B, P=7, M, d]"),
        ({"value": torch.zeros(2, 7, 6)}, ValueError, "value has shape [2, 7, 6], expected [B, P=7, M, d]"),
        (
            {"sampling_locations": torch.zeros(2, 5, 2, 2, 4, 3)},
            ValueError,
            "sampling_locations has shape [2, 5, 2, 2, 4, 3], expected [B=2, Q, M=2, L=2, N, 2=2]",
        ),
        (
            {"attention_weights": torch.zeros(2, 5, 2, 3, 4)},
            ValueError,
            "attention_weights has shape [2, 5, 2, 3, 4], expected [B=2, Q=5, M=2, L=2, N=4]",
        ),
        (
            {"attention_weights": torch.zeros(2, 5, 2, 2, 4).long()},
            TypeError,
            "attention_weights must be floating point, found torch.int64",
        ),
        (
            {"sampling_locations": torch.zeros(2, 5, 2, 2, 4, 2).half()},
            TypeError,
            "sampling_locations is torch.float16, value torch.float32",
        ),
        ({"spatial_shapes": [(2, 3), (0, 1)]}, ValueError, "spatial_shapes has a level (0, 1), expected (h, w), both positive"),
        ({"spatial_shapes": [(2, 3, 1)]}, ValueError, "spatial_shapes has a level (2, 3, 1), expected (h, w), both positive"),
        ({"spatial_shapes": [(2, 3)]}, ValueError, "value has shape [2, 7, 2, 3], expected [B, P=6, M, d]"),
        ({"backend": "cudnn"}, ValueError, "backend='cudnn' is no backend of deformable_attention"),
    ],
)
def test_deformable_attention(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "value": torch.zeros(2, 7, 2, 3),
        "spatial_shapes": [(2, 3), (1, 1)],
        "sampling_locations": torch.zeros(2, 5, 2, 2, 4, 2),
        "attention_weights": torch.zeros(2, 5, 2, 2, 4),
    }
    with pytest.raises(error, match=re.escape(message)):
        deformable_attention(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"reference_points": torch.zeros(4, 2)},
            ValueError,
            "reference_points has shape [4, 2], expected [Q=5, 2=2]",
        ),
        (
            {"reference_points": torch.zeros(2, 5, 3, 2)},
            ValueError,
            "reference_points has shape [2, 5, 3, 2], expected [B=2, Q=5, L=2, 2=2]",
        ),
        ({"reference_points": [(0.5, 0.5)]}, TypeError, "reference_points must be a tensor [B, Q, L, 2], found list"),
        (
            {"reference_points": torch.zeros(5, 2, device="meta")},
            ValueError,
            "reference_points is on meta, value on cpu: expected the same device",
        ),
        (
            {"sampling_offsets": torch.zeros(2, 5, 2, 2, 4)},
            ValueError,
            "sampling_offsets has shape [2, 5, 2, 2, 4], expected [B=2, Q, M=2, L=2, N, 2=2]",
        ),
        (
            {"value": torch.zeros(2, 7, 2, 3).half(), "sampling_offsets": torch.zeros(2, 5, 2, 2, 4, 2, device="meta")},
            ValueError,
            "sampling_offsets is on meta, value on cpu: expected the same device",
        ),
        ({"attention_logits": torch.zeros(2, 5, 2, 2, 4).double()}, TypeError, "attention_logits is torch.float64, value torch.float32"),
    ],
)
def test_deformable_attention_from_offsets(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "value": torch.zeros(2, 7, 2, 3),
        "spatial_shapes": [(2, 3), (1, 1)],
        "reference_points": torch.zeros(5, 2),
        "sampling_offsets": torch.zeros(2, 5, 2, 2, 4, 2),
        "attention_logits": torch.zeros(2, 5, 2, 2, 4),
    }
    with pytest.raises(error, match=re.escape(message)):
        deformable_attention_from_offsets(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": torch.zeros(4, 5, 7)}, ValueError, "features has shape [4, 5, 7], expected [B, C, H, W]"),
        ({"weight": torch.zeros(3, 5, 3, 3)}, ValueError, "weight has shape [3, 5, 3, 3], expected [O, C=4, kh, kw]"),
        ({"offsets": torch.zeros(2, 9, 5, 7)}, ValueError, "offsets has shape [2, 9, 5, 7], expected [B=2, 2*kh*kw=18, h=5, w=7]"),
        ({"masks": torch.zeros(2, 18, 5, 7)}, ValueError, "masks has shape [2, 18, 5, 7], expected [B=2, kh*kw=9, h=5, w=7]"),
        ({"padding": 0}, ValueError, "offsets has shape [2, 18, 5, 7], expected [B=2, 2*kh*kw=18, h=3, w=5]"),
        ({"padding": 0, "dilation": 3}, ValueError, "features has shape [2, 4, 5, 7]: padding=0 leaves no room for 3 taps along h"),
        ({"stride": 0}, ValueError, "stride=0, expected 1 or more"),
        ({"padding": -1}, ValueError, "padding=-1, expected 0 or more"),
        ({"masks": torch.zeros(2, 9, 5, 7, dtype=torch.bool)}, TypeError, "masks must be floating point, found torch.bool"),
        ({"weight": torch.zeros(3, 4, 3, 3).half()}, TypeError, "weight is torch.float16, features torch.float32: expected the same dtype"),
        ({"offsets": torch.zeros(2, 18, 5, 7, device="meta")}, ValueError, "offsets is on meta, features on cpu"),
        ({"backend": "cudnn"}, ValueError, "backend='cudnn' is no backend of deformable_conv"),
    ],
)
def test_deformable_conv(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "features": torch.zeros(2, 4, 5, 7),
        "offsets": torch.zeros(2, 18, 5, 7),
        "masks": torch.zeros(2, 9, 5, 7),
        "weight": torch.zeros(3, 4, 3, 3),
        "padding": 1,
    }
    with pytest.raises(error, match=re.escape(message)):
        deformable_conv(**{**arguments, **changes})


def test_what_passed_once_is_checked_again_where_it_differs() -> None:
    """Checks run once per signature: neither an error nor a pass may stick to another call."""
    for _ in range(2):
        select_prototypes(features(), queries(), mask())
        with pytest.raises(ValueError, match=r"queries has shape \[2, 3, 6\]"):
            select_prototypes(features(), queries(2, 3, 6), mask())
        with pytest.raises(ValueError, match="k=8 prototypes from P=7"):
            select_prototypes(features(), queries(), mask(), k=8)
        with pytest.raises(TypeError, match=re.escape(ALLOWED)):
            select_prototypes(features(), queries(), mask(dtype=torch.uint8))
        with pytest.raises(ValueError, match="queries is on meta"):
            select_prototypes(features(), queries().to("meta"), mask())


def test_signatures_are_forgotten_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MOST_SIGNATURES", 3)
    seen: list[int] = []
    check = checks.once_per_signature(lambda tensor: seen.append(len(tensor)))
    for length in (1, 1, 2, 3, 3, 4, 1, 4):
        check(torch.zeros(length))
    assert seen == [1, 2, 3, 4, 1]
