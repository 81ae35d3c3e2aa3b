"""The native CPU backend on every instruction set of this machine, against the float64 reference."""

from __future__ import annotations

import random

import pytest
import torch
from emca_kernels import pool_prototypes, select_prototypes
from emca_kernels.native import library
from emca_kernels.specs import POOL_PROTOTYPES, SELECT_PROTOTYPES
from torch import Tensor

INSTRUCTION_SETS = ("base", "avx2", "avx512", "avx512bf16")
PIXELS = (1, 7, 255, 1000, 4099)
QUERIES = (1, 15, 37, 100, 130)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.skipif(library.unavailable() is not None, reason=f"no native library: {library.unavailable()}")


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set that this CPU has."""
    monkeypatch.setenv("EMCA_ISA", request.param)
    try:
        assert library.instruction_set() == request.param
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    return request.param


def masks(kind: str, queries: int, pixels: int) -> Tensor | None:
    """None, or bool [2, Q, P] with empty and full rows."""
    if kind == "none":
        return None
    allowed = torch.rand(2, queries, pixels) < 0.2
    allowed[0, ::3] = False
    allowed[1, 1::4] = True
    return allowed


def poisoned(tensor: Tensor, layout: str) -> Tensor:
    """The same values inside of a larger tensor of NaN: rows apart, or channels apart as in a map [B, C, h, w]."""
    batch, rows, width = tensor.shape
    if layout == "rows":
        room = torch.full((batch, rows + 2, width + 3), torch.nan, dtype=tensor.dtype)
        view = room[:, 1:-1, 2:-1]
    else:
        view = torch.full((batch, width, rows + 5), torch.nan, dtype=tensor.dtype)[:, :, 3:-2].mT
    return view.copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pixels", PIXELS)
def test_ties_empty_and_full_masks_choose_as_the_reference(isa: str, pixels: int, dtype: torch.dtype, seed: int) -> None:
    """Small integers: exact sums and many ties. Each run draws other combinations."""
    draw = random.Random(seed)
    for queries in QUERIES:
        features, asked = torch.randint(-3, 4, (2, pixels, 24)).to(dtype), torch.randint(-3, 4, (2, queries, 24)).to(dtype)
        heads, k, layout = draw.choice((1, 4)), draw.randint(1, min(3, pixels)), draw.choice(("rows", "channels"))
        allowed = masks(draw.choice(("none", "random")), queries, pixels)
        position = draw.choice((None, torch.randint(-2, 3, (1, pixels, 24)).to(dtype)))
        source = features.double() if position is None else features.double() + position.double()
        wanted = select_prototypes(source, asked.double(), allowed, k=k, heads=heads, backend="reference")
        given = poisoned(features, layout), poisoned(asked, "rows")
        found = select_prototypes(*given, allowed, k=k, heads=heads, position=position, backend="native")
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1].double(), wanted[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_choices_have_no_regret(isa: str, dtype: torch.dtype) -> None:
    """Random numbers: the float64 score of the choice is the best up to rounding, and the best one is chosen where it is clear."""
    features, queries = torch.randn(2, 1000, 96).to(dtype), torch.randn(2, 37, 96).to(dtype)
    allowed = masks("random", 37, 1000)
    assert allowed is not None
    indices, scores = select_prototypes(features, queries, allowed, backend="native")
    best, values = select_prototypes(features.double(), queries.double(), allowed, k=2, backend="reference")
    open_everywhere = allowed | ~allowed.any(-1, keepdim=True)
    exact = (queries.double() @ features.double().mT).masked_fill(~open_everywhere, -torch.inf)
    tolerance = (
        SELECT_PROTOTYPES.tolerance[str(dtype).removeprefix("torch.")]
        * exact.isfinite().double().mul(exact.nan_to_num(neginf=0).abs()).max()
    )
    chosen = exact.gather(-1, indices[:, :, 0])
    assert (values[:, :, 0, :1] - chosen).max() <= tolerance
    clear = values[:, :, 0, 0] - values[:, :, 0, 1] > tolerance
    assert torch.equal(indices[:, :, 0, 0][clear], best[:, :, 0, 0][clear])
    torch.testing.assert_close(scores[:, :, 0].double(), chosen, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-4)


def test_all_negative_scores(isa: str) -> None:
    """A padded zero would win."""
    features, queries = torch.randint(1, 9, (1, 77, 20)).float(), -torch.randint(1, 9, (1, 19, 20)).float()
    wanted = select_prototypes(features.double(), queries.double(), backend="reference")
    found = select_prototypes(features, queries, backend="native")
    assert torch.equal(found[0], wanted[0])
    assert (found[1] < 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pixels", PIXELS)
def test_pools_as_the_reference(isa: str, pixels: int, dtype: torch.dtype, seed: int) -> None:
    draw = random.Random(seed)
    tolerance = POOL_PROTOTYPES.tolerance[str(dtype).removeprefix("torch.")]
    for queries in QUERIES:
        features, asked = torch.randn(2, pixels, 52).to(dtype), torch.randn(2, queries, 52).to(dtype)
        heads, layout = draw.choice((1, 4)), draw.choice(("rows", "channels"))
        kind, soft = draw.choice((("none", True), ("random", True), ("random", False)))
        allowed = masks(kind, queries, pixels)
        position = draw.choice((None, torch.randn(pixels, 52).to(dtype)))
        source = features.double() if position is None else features.double() + position.double()
        wanted = pool_prototypes(source, asked.double() if soft else None, allowed, heads=heads, backend="reference")
        given = poisoned(features, layout), asked if soft else None
        found = pool_prototypes(*given, allowed, heads=heads, position=position, backend="native")
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1)


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0, 1e4])
def test_softmax_neither_overflows_nor_vanishes(isa: str, scale: float) -> None:
    features, queries = torch.randn(1, 300, 32), scale * torch.randn(1, 21, 32)
    found = pool_prototypes(features, queries, masks("random", 21, 300)[:1], backend="native")  # type: ignore[index]
    assert found.isfinite().all()
    alike = pool_prototypes(features, torch.zeros_like(queries), backend="native")
    torch.testing.assert_close(alike[:, :, 0], features.mean(1, keepdim=True).expand(-1, 21, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "soft"), [("none", True), ("random", True), ("random", False)])
def test_gradients_of_pools(kind: str, soft: bool) -> None:
    """More pixels than a tile of the backward pass. The error may be twice that of plain torch in float32, both against float64.

    And no less than what the rounding of a logsumexp of about 10 does to every weight.
    """
    pixels, queries = 2500, 11
    given = torch.randn(2, pixels, 24), torch.randn(2, queries, 24), torch.randn(1, pixels, 24)
    allowed, weight = masks(kind, queries, pixels), torch.randn(2, queries, 3, 8)
    outcomes = []
    for backend, dtype in (("native", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        features, asked, position = (tensor.to(dtype, copy=True).requires_grad_() for tensor in given)
        pooled = pool_prototypes(features, asked if soft else None, allowed, heads=3, position=position, backend=backend)
        (pooled * weight.to(dtype)).sum().backward()
        outcomes.append([features.grad, position.grad, *([asked.grad] if soft else [])])
    for found, plain, exact in zip(*outcomes, strict=True):
        assert found is not None
        assert (found - exact).norm() <= 2 * (plain - exact).norm() + 10 * torch.finfo(torch.float32).eps * exact.norm()


def test_threads_do_not_change_a_bit(isa: str) -> None:
    features, queries, allowed = torch.randn(2, 3001, 64), torch.randn(2, 100, 64), masks("random", 100, 3001)
    before = torch.get_num_threads()
    outcomes = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for _ in range(2):
                outcomes.append(
                    [
                        *select_prototypes(features, queries, allowed, backend="native"),
                        *select_prototypes(features, queries, allowed, k=4, backend="native"),
                        pool_prototypes(features, queries, allowed, backend="native"),
                        pool_prototypes(features, None, allowed, backend="native"),
                    ]
                )
    finally:
        torch.set_num_threads(before)
    for outcome in outcomes[1:]:
        for one, other in zip(outcomes[0], outcome, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(1, 2, 4, dtype=torch.float64), "float64"),
        (torch.zeros(1, 2, 4, device="meta"), "meta tensors"),
        (torch.zeros(0, 2, 4), "empty tensors"),
    ],
)
def test_what_it_refuses(tensor: Tensor, reason: str) -> None:
    assert library.refuses(tensor) == reason


def test_an_unknown_instruction_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMCA_ISA", "avx1024")
    with pytest.raises(RuntimeError, match=r"EMCA_ISA='avx1024' is no instruction set of this CPU; known here: .*base"):
        select_prototypes(torch.randn(1, 4, 4), torch.randn(1, 2, 4), backend="native")
