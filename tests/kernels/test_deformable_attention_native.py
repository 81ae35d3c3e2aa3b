"""Deformable attention by the native CPU backend, on every instruction set of this machine, against the float64 reference."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from emca_kernels import deformable_attention, deformable_attention_from_offsets
from emca_kernels.deformable_attention.reference import locations_and_weights
from emca_kernels.native import library
from torch import Tensor

INSTRUCTION_SETS = ("base", "avx2", "avx512")
SHAPES = [(3, 5), (1, 1), (17, 2), (1, 9)]
PIXELS = sum(rows * columns for rows, columns in SHAPES)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Relative to the largest number: rounding of float32 sums, or of the result to its dtype."""

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


def poisoned(tensor: Tensor) -> Tensor:
    """The same values inside of a larger tensor of NaN."""
    around = torch.full([size + 4 for size in tensor.shape], torch.nan, dtype=tensor.dtype)
    return around[tuple(slice(2, 2 + size) for size in tensor.shape)].copy_(tensor)


def inputs(draw: random.Random, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value, reference points, offsets and logits: some samples far outside, the rest in and around the map."""
    heads, points, queries = draw.choice((1, 3, 8)), draw.choice((1, 3, 4)), draw.choice((1, 7, 37))
    print(f"M={heads} N={points} Q={queries} d={width} {dtype}")
    samples = (2, queries, heads, len(SHAPES), points)
    offsets = 3 * torch.randn(*samples, 2)
    offsets[torch.rand(samples) < 0.05] = 5e4
    return torch.randn(2, PIXELS, heads, width).to(dtype), torch.rand(queries, 2), offsets.to(dtype), torch.randn(samples).to(dtype)


def between_pixels(points: Tensor, offsets: Tensor) -> Tensor:
    """Offsets moved so that no sample is nearly at the centre of a pixel: there the gradient jumps, and rounding chooses the side."""
    moved = offsets.clone()
    for level, (height, width) in enumerate(SHAPES):
        at = points[None, :, None, None].double() * points.new_tensor([width, height]) + moved[:, :, :, level].double() - 0.5
        moved[:, :, :, level] += 0.1 * ((at - at.round()).abs() < 0.02)
    return moved


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Within a tolerance relative to the largest number."""
    assert found.shape == wanted.shape
    assert (found.double() - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [1, 8, 32, 37, 80])
def test_samples_as_the_reference(isa: str, width: int, dtype: torch.dtype, seed: int) -> None:
    value, points, offsets, logits = inputs(random.Random(seed), width, dtype)
    exact = [tensor.double() for tensor in (points, offsets, logits)]
    wanted = deformable_attention_from_offsets(value.double(), SHAPES, *exact, backend="reference")
    found = deformable_attention_from_offsets(poisoned(value), SHAPES, points, poisoned(offsets), poisoned(logits), backend="native")
    assert found.dtype == dtype
    close(found, wanted, 4 * TOLERANCE[dtype])
    placed = locations_and_weights(SHAPES, points[None, :, None].double().expand(2, -1, 4, -1), exact[1], exact[2])
    locations, weights = (tensor.float() for tensor in placed)
    found = deformable_attention(poisoned(value), SHAPES, poisoned(locations), poisoned(weights), backend="native")
    wanted = deformable_attention(value.double(), SHAPES, locations.double(), weights.double(), backend="reference")
    close(found, wanted, 4 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [5, 32, 48])
def test_gradients(isa: str, width: int, dtype: torch.dtype, seed: int) -> None:
    value, points, offsets, logits = inputs(random.Random(seed), width, dtype)
    given = (value, points, between_pixels(points, offsets), logits)
    fast = [tensor.clone().requires_grad_() for tensor in given]
    exact = [tensor.double().requires_grad_() for tensor in given]
    found = deformable_attention_from_offsets(fast[0], SHAPES, *fast[1:], backend="native")
    wanted = deformable_attention_from_offsets(exact[0], SHAPES, *exact[1:], backend="reference")
    upstream = torch.randn_like(found)
    for one, other in zip(torch.autograd.grad(found, fast, upstream), torch.autograd.grad(wanted, exact, upstream.double()), strict=True):
        # a sum of a thousand float32 numbers before it is rounded to its dtype
        close(one, other, 10 * TOLERANCE[torch.float32] + 2 * TOLERANCE[dtype])


def test_small_integers_at_pixels_and_on_borders_are_exact(isa: str) -> None:
    """Positions in halves of a pixel, from beyond one border to beyond the other: every product and sum is exact in float32."""
    shapes, size = [(4, 8), (8, 2)], torch.tensor([[[8.0, 4.0]], [[2.0, 8.0]]])
    steps = torch.arange(-6, 24) / 2
    x, y = torch.meshgrid(steps, steps, indexing="ij")
    locations = (torch.stack((x, y), -1).flatten(0, 1)[None, :, None, None, None] + 0.5) / size
    value, weights = torch.randint(-9, 10, (1, 48, 1, 32)).float(), torch.randint(-3, 4, (1, 900, 1, 2, 1)).float()
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    outcomes = []
    for backend, dtype in (("native", torch.float32), ("reference", torch.float64)):
        sampled, at, shares = (leaf.detach().to(dtype).requires_grad_() for leaf in leaves)
        result = deformable_attention(sampled, shapes, at, shares, backend=backend)
        result.sum().backward()
        outcomes.append((result, sampled.grad, at.grad, shares.grad))
    for found, wanted in zip(*outcomes, strict=True):
        assert found is not None
        assert torch.equal(found.double(), wanted)


@pytest.mark.parametrize("nonsense", [torch.nan, torch.inf, -torch.inf])
def test_a_position_that_is_not_finite_spoils_its_query_and_head_alone(isa: str, nonsense: float, seed: int) -> None:
    value, points, offsets, logits = inputs(random.Random(seed), 32)
    heads = value.shape[2]
    spoilt = offsets.clone()
    spoilt[0, 0, 0, 2, 0, 1] = nonsense
    outcomes = [
        deformable_attention_from_offsets(value, SHAPES, points, at, logits, backend="native").unflatten(-1, (heads, 32))
        for at in (offsets, spoilt)
    ]
    assert outcomes[1][0, 0, 0].isnan().all()
    outcomes[1][0, 0, 0] = outcomes[0][0, 0, 0]
    assert torch.equal(*outcomes)
    leaves = [tensor.requires_grad_() for tensor in (value, spoilt, logits)]
    spoilt_result = deformable_attention_from_offsets(value, SHAPES, points, spoilt, logits, backend="native")
    assert [gradient.shape for gradient in torch.autograd.grad(spoilt_result.sum(), leaves)] == [leaf.shape for leaf in leaves]


def test_infinite_values_stay_where_they_are(isa: str) -> None:
    """Samples that do not touch the pixel are finite: no corner is read for nothing inside of the map."""
    value = torch.zeros(1, 16, 1, 32)
    value[0, 5] = torch.inf
    locations = torch.tensor([[0.9, 0.9], [0.4, 0.4]]).view(1, 2, 1, 1, 1, 2)
    far, near = deformable_attention(value, [(4, 4)], locations, torch.ones(1, 2, 1, 1, 1), backend="native")[0]
    assert far.isfinite().all()
    assert near.isinf().all()


@pytest.mark.parametrize("images", [1, 3])
def test_threads_do_not_change_a_bit(isa: str, images: int, seed: int) -> None:
    draw = random.Random(seed)
    value, points, offsets, logits = inputs(draw, 32)
    offsets, logits, value = (torch.cat([tensor] * 2)[:images] for tensor in (offsets, logits, value))
    leaves = [tensor.requires_grad_() for tensor in (value, offsets, logits)]

    def outcome() -> list[Tensor]:
        result = deformable_attention_from_offsets(value, SHAPES, points, offsets, logits, backend="native")
        return [result, *torch.autograd.grad(result.square().sum(), leaves)]

    outcomes = with_threads(outcome)
    for other in outcomes[1:]:
        for one, same in zip(outcomes[0], other, strict=True):
            assert torch.equal(one, same)


def with_threads(call: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
    before = torch.get_num_threads()
    try:
        outcomes = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outcomes.append(call())
    finally:
        torch.set_num_threads(before)
    return outcomes


def test_softmax_neither_overflows_nor_vanishes(isa: str, seed: int) -> None:
    value, points, offsets, logits = inputs(random.Random(seed), 16)
    for scale in (0.0, 100.0, 1e4):
        found = deformable_attention_from_offsets(value, SHAPES, points, offsets, scale * logits, backend="native")
        exact = (tensor.double() for tensor in (points, offsets, scale * logits))
        close(found, deformable_attention_from_offsets(value.double(), SHAPES, *exact, backend="reference"), 1e-5)


def test_reference_points_of_their_own_for_images_and_levels(isa: str, seed: int) -> None:
    value, points, offsets, logits = inputs(random.Random(seed), 16)
    points = torch.rand(2, len(points), len(SHAPES), 2)
    found = deformable_attention_from_offsets(value, SHAPES, points.mT.contiguous().mT, offsets, logits, backend="native")
    exact = (tensor.double() for tensor in (points, offsets, logits))
    close(found, deformable_attention_from_offsets(value.double(), SHAPES, *exact, backend="reference"), 1e-5)


def test_channels_may_lie_apart(isa: str, seed: int) -> None:
    value, points, offsets, logits = inputs(random.Random(seed), 32)
    packed = deformable_attention_from_offsets(value, SHAPES, points, offsets, logits, backend="native")
    for apart in (value.transpose(1, 3).contiguous().transpose(1, 3), value[:1].expand(2, -1, -1, -1)):
        found = deformable_attention_from_offsets(apart, SHAPES, points, offsets, logits, backend="native")
        assert torch.equal(found[0], packed[0])
