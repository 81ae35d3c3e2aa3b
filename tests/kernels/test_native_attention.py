"""The whole layer on every instruction set of this machine, against the float64 reference."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch
from emca_kernels import Projections, emca_attention
from emca_kernels.backends import explain_backend
from emca_kernels.emca_attention.arguments import RESIDUALS, SELECTIONS
from emca_kernels.native import library
from torch import Tensor

INSTRUCTION_SETS = ("base", "avx2", "avx512", "avx512bf16")
PIXELS = (1, 7, 255, 1000, 4099)
QUERIES = (1, 15, 37, 100, 130)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Of results, relative to the largest: float32 sums, then the dtype."""

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


class Layer(NamedTuple):
    """A call of the operator."""

    features: Tensor
    queries: Tensor
    allowed: Tensor | None
    position: Tensor | None
    query_position: Tensor | None
    projections: Projections

    def to(self, dtype: torch.dtype) -> Layer:
        """The same call in another dtype."""
        rest = (None if tensor is None else tensor.to(dtype) for tensor in self[3:5])
        return Layer(self.features.to(dtype), self.queries.to(dtype), self.allowed, *rest, Projections(*(p.to(dtype) for p in self[5])))

    def run(self, backend: str, selection: str = "argmax", residual: str = "projected", scale: Tensor | None = None) -> tuple[Tensor, ...]:
        """Updated queries, prototypes, and chosen pixels or logsumexp."""
        inputs = (self.features, self.queries, self.allowed, None)
        places = [None if place is None else place.expand_as(content) for place, content in zip(self[3:5], self[:2], strict=True)]
        return torch.ops.emca.emca_attention(*inputs, *places, *self.projections, scale, selection, residual, backend)


def random_projections(width: int, keys: int) -> Projections:
    shapes = ((keys, width), (keys,), (keys, width), (keys,), (keys, keys), (keys,), (keys,), (width, keys), (width,))
    return Projections(*(torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes))


def signed_permutation(width: int) -> Tensor:
    return torch.eye(width)[torch.randperm(width)] * torch.randint(0, 2, (width, 1)).mul(2).sub(1)


def random_mask(queries: int, pixels: int) -> Tensor:
    """Bool [2, Q, P] with empty and full rows."""
    allowed = torch.rand(2, queries, pixels) < 0.2
    allowed[0, ::3] = False
    allowed[1, 1::4] = True
    return allowed


def apart(tensor: Tensor, layout: str) -> Tensor:
    """The same values among NaN: rows apart, or channels apart as in a map [B, C, h, w]."""
    batch, rows, width = tensor.shape
    if layout == "rows":
        view = torch.full((batch, rows + 2, width + 3), torch.nan, dtype=tensor.dtype)[:, 1:-1, 2:-1]
    else:
        view = torch.full((batch, width, rows + 5), torch.nan, dtype=tensor.dtype)[:, :, 3:-2].mT
    return view.copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pixels", PIXELS)
def test_ties_choose_as_the_reference(isa: str, pixels: int, dtype: torch.dtype, seed: int) -> None:
    """Small integers and projections that only move and flip channels: exact sums and many ties."""
    draw = random.Random(seed)
    for queries in QUERIES:
        width = draw.choice((7, 12))
        moved = [signed_permutation(width) for _ in range(4)]
        biases = [torch.zeros(width)] * 4
        projections = Projections(moved[0], biases[0], moved[1], biases[1], moved[2], biases[2], torch.ones(width), moved[3], biases[3])
        features, asked = torch.randint(-3, 4, (2, pixels, width)).float(), torch.randint(-3, 4, (2, queries, width)).float()
        position = draw.choice((None, torch.randint(-2, 3, (1, pixels, width)).float()))
        layer = Layer(features, asked, draw.choice((None, random_mask(queries, pixels))), position, None, projections)
        wanted = layer.to(torch.float64).run("reference")
        given = layer.to(dtype)
        given = given._replace(features=apart(given.features, draw.choice(("rows", "channels"))), queries=apart(given.queries, "rows"))
        _, rows, kept = given.run("native")
        assert torch.equal(kept, wanted[2])
        assert torch.equal(rows.double(), wanted[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pixels", PIXELS)
def test_a_choice_has_no_regret_and_what_follows_is_exact(isa: str, pixels: int, dtype: torch.dtype, seed: int) -> None:
    draw = random.Random(seed)
    for queries in QUERIES:
        width, residual = draw.choice((33, 52)), draw.choice(RESIDUALS)
        projections = random_projections(width, width if residual == "projected" else draw.choice((24, 41)))
        allowed = draw.choice((None, random_mask(queries, pixels)))
        places = draw.choice((None, torch.randn(pixels, width))), draw.choice((None, torch.randn(queries, width)))
        layer = Layer(torch.randn(2, pixels, width), torch.randn(2, queries, width), allowed, *places, projections).to(dtype)
        updated, rows, kept = layer.run("native", residual=residual)
        exact = layer.to(torch.float64)

        source = exact.features if exact.position is None else exact.features + exact.position
        located = exact.queries if exact.query_position is None else exact.queries + exact.query_position
        weights = exact.projections
        folded = (located @ weights.query_weight_DC.T + weights.query_bias_D) @ weights.key_weight_DC
        scores = folded @ source.mT
        size = scores.abs().max()
        if allowed is not None:
            scores = scores.masked_fill(~(allowed | ~allowed.any(-1, keepdim=True)), -torch.inf)
        regret = scores.amax(-1) - scores.gather(-1, kept[..., None])[..., 0]
        # folded queries are rounded where products are those of bfloat16
        folds_rounded = dtype == torch.bfloat16 and isa == "avx512bf16"
        assert regret.max() <= (2**-8 if folds_rounded else 1e-5) * size

        # each query has its own prototype as its only pixel
        chosen = source.gather(1, kept[..., None].expand(-1, -1, width))
        own = torch.eye(queries, dtype=torch.bool).expand(2, -1, -1)
        wanted, _, _ = exact._replace(features=chosen, position=None, allowed=own).run("reference", residual=residual)
        torch.testing.assert_close(rows.double(), chosen, rtol=ROUNDING[dtype], atol=1e-6)
        assert (updated.double() - wanted).abs().max() <= ROUNDING[dtype] * wanted.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pixels", [1, 255, 4099])
def test_soft_and_mean_prototypes(isa: str, pixels: int, dtype: torch.dtype, seed: int) -> None:
    draw = random.Random(seed)
    for queries in QUERIES:
        selection, residual, width = draw.choice(("softmax", "mean")), draw.choice(RESIDUALS), draw.choice((17, 48))
        allowed = random_mask(queries, pixels) if selection == "mean" else draw.choice((None, random_mask(queries, pixels)))
        places = draw.choice((None, torch.randn(1, pixels, width))), draw.choice((None, torch.randn(2, queries, width)))
        projections = random_projections(width, width)
        layer = Layer(torch.randn(2, pixels, width), torch.randn(2, queries, width), allowed, *places, projections).to(dtype)
        scale = torch.tensor(0.3, dtype=dtype) if selection == "softmax" else None
        found = layer.run("native", selection, residual, scale)
        wanted = layer.to(torch.float64).run("reference", selection, residual, None if scale is None else scale.double())
        for one, other in zip(found, wanted, strict=True):
            assert (one.double() - other).abs().max() <= 4 * ROUNDING[dtype] * max(1.0, float(other.abs().max()))


def test_threads_do_not_change_a_bit(isa: str) -> None:
    layer = Layer(
        *(torch.randn(2, n, 64) for n in (3001, 100)), random_mask(100, 3001), torch.randn(3001, 64), None, random_projections(64, 64)
    )
    before = torch.get_num_threads()
    outcomes = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for dtype in (torch.float32, torch.bfloat16):
                outcomes.append([part for selection in SELECTIONS for part in layer.to(dtype).run("native", selection)])
    finally:
        torch.set_num_threads(before)
    for first, *others in (outcomes[::2], outcomes[1::2]):
        for other in others:
            assert all(torch.equal(one, same) for one, same in zip(first, other, strict=True))


def test_weights_may_lie_anywhere(isa: str) -> None:
    layer = Layer(torch.randn(1, 90, 24), torch.randn(1, 19, 24), None, None, None, random_projections(24, 24))
    wanted = layer.run("native")
    for change in (lambda weight: weight.T.contiguous().T, lambda weight: torch.stack((weight, weight), -1).flatten(-2)[..., ::2]):
        moved = Projections(*(change(parameter) if parameter.dim() == 2 else parameter for parameter in layer.projections))
        for one, other in zip(layer._replace(projections=moved).run("native"), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_score_that_is_not_a_number_never_wins(isa: str, dtype: torch.dtype) -> None:
    layer = Layer(torch.randn(1, 77, 16), torch.randn(1, 9, 16), None, None, None, random_projections(16, 16)).to(dtype)
    _, _, before = layer.run("native")
    features = layer.features.clone()
    spoiled = [pixel for pixel in range(77) if pixel not in before[0].tolist()][::3]
    features[0, spoiled] = torch.nan
    assert torch.equal(layer._replace(features=features).run("native")[2], before)
    nothing_else = layer._replace(features=torch.full_like(features, torch.nan)).run("native")
    assert ((nothing_else[2] >= 0) & (nothing_else[2] < 77)).all()
    assert nothing_else[0].isnan().all()
    for selection in ("softmax", "mean"):
        allowed = torch.ones(1, 9, 77, dtype=torch.bool)
        assert layer._replace(features=features, allowed=allowed).run("native", selection)[0].isnan().all()


def test_a_query_that_is_not_a_number_spoils_no_other(isa: str) -> None:
    layer = Layer(torch.randn(1, 77, 16), torch.randn(1, 9, 16), None, None, None, random_projections(16, 16))
    wanted, _, _ = layer.run("native")
    queries = layer.queries.clone()
    queries[0, 4] = torch.inf
    found, _, kept = layer._replace(queries=queries).run("native")
    assert 0 <= kept[0, 4] < 77
    others = [query for query in range(9) if query != 4]
    assert torch.equal(found[0, others], wanted[0, others])


def test_all_negative_scores_and_a_product_of_zero(isa: str) -> None:
    """A padded zero would win; a norm of zero is clamped."""
    width = 20
    zero, eye = torch.zeros(width), torch.eye(width)
    projections = Projections(eye, zero, eye, zero, torch.zeros(width, width), zero, torch.ones(width), eye, zero)
    features, queries = torch.randint(1, 9, (1, 77, width)).float(), -torch.randint(1, 9, (1, 19, width)).float()
    layer = Layer(features, queries, None, None, None, projections)
    updated, rows, kept = layer.run("native")
    assert torch.equal(kept, layer.to(torch.float64).run("reference")[2])
    torch.testing.assert_close(updated, rows + layer.queries)


def test_no_queries(isa: str) -> None:
    for selection in SELECTIONS:
        layer = Layer(
            torch.randn(2, 7, 8), torch.randn(2, 0, 8), torch.ones(2, 0, 7, dtype=torch.bool), None, None, random_projections(8, 8)
        )
        updated, rows, kept = layer.run("native", selection)
        assert updated.shape == rows.shape == (2, 0, 8)
        assert kept.shape == (2, 0)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_gradients(selection: str) -> None:
    """The error may be three times that of plain torch in float32, both against float64."""
    layer = Layer(
        *(torch.randn(2, n, 24) for n in (500, 21)),
        random_mask(21, 500),
        torch.randn(500, 24),
        torch.randn(21, 24),
        random_projections(24, 24),
    )
    weight, outcomes = torch.randn(2, 21, 24), []
    for backend, dtype in (("native", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        given = layer.to(dtype)
        wanted = [tensor.clone().requires_grad_() for tensor in (*given[:2], *given[3:5], *given.projections)]
        features, queries, position, query_position, *parameters = wanted
        scale = torch.tensor(0.3, dtype=dtype, requires_grad=True) if selection == "softmax" else None
        options = {"position": position, "query_position": query_position, "scale": scale, "selection": selection, "backend": backend}
        attended = emca_attention(features, queries, given.allowed, Projections(*parameters), **options)
        outcomes.append(
            torch.autograd.grad((attended * weight.to(dtype)).sum(), [*wanted, *([scale] if scale is not None else [])], allow_unused=True)
        )
    # the scale's gradient is a sum of products with the queries: one number, of which little may be left
    products = outcomes[-1][1].norm() * layer.queries.norm()
    for found, plain, exact in zip(*outcomes, strict=True):
        assert (found is None) == (exact is None)
        if found is not None:
            size = products if exact.dim() == 0 else exact.norm()
            assert (found - exact).norm() <= 3 * (plain - exact).norm() + 10 * torch.finfo(torch.float32).eps * size


def test_who_serves() -> None:
    features, queries = torch.randn(1, 5, 8), torch.randn(1, 2, 8)
    assert explain_backend("emca_attention", features, queries)[0] == "native"
    assert explain_backend("emca_attention", features.double(), queries.double())[0] == "reference"
    assert explain_backend("emca_attention", features[:0], queries[:0])[0] == "reference"
