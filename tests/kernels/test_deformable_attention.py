"""Multi-scale deformable attention against a loop over sampled points in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from emca_kernels import deformable_attention, deformable_attention_from_offsets, explain_backend
from emca_kernels.backends import record_backends
from emca_kernels.deformable_attention import op
from emca_kernels.native import library
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

Shapes = list[tuple[int, int]]

SHAPES: Shapes = [(3, 5), (1, 2), (4, 1)]


def bilinear(values_hwd: np.ndarray, x: float, y: float) -> np.ndarray:
    """Value at pixel coordinates, zero beyond the border."""
    height, width = values_hwd.shape[:2]
    left, top = math.floor(x), math.floor(y)
    total = np.zeros(values_hwd.shape[2])
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < height and 0 <= column < width:
                total += (1 - abs(x - column)) * (1 - abs(y - row)) * values_hwd[row, column]
    return total


def oracle(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> np.ndarray:
    values, at, shares = (tensor.double().numpy() for tensor in (value, locations, weights))
    batch, queries, heads, _, points, _ = at.shape
    result = np.zeros((batch, queries, heads, value.shape[-1]))
    for b, q, m, n in np.ndindex(batch, queries, heads, points):
        start = 0
        for level, (height, width) in enumerate(shapes):
            level_map = values[b, start : start + height * width, m].reshape(height, width, -1)
            x, y = at[b, q, m, level, n]
            result[b, q, m] += shares[b, q, m, level, n] * bilinear(level_map, x * width - 0.5, y * height - 0.5)
            start += height * width
    return result.reshape(batch, queries, -1)


def make_inputs(batch: int, queries: int, heads: int, points: int, width: int, shapes: Shapes) -> tuple[Tensor, Tensor, Tensor]:
    """Sampled positions between pixels, some beyond the border, none where the bilinear kernel has its kinks."""
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, width, dtype=torch.float64)
    locations = torch.empty(batch, queries, heads, len(shapes), points, 2, dtype=torch.float64)
    for level, (height, columns) in enumerate(shapes):
        for axis, size in enumerate((columns, height)):
            whole = torch.randint(-2, size + 1, (*locations.shape[:3], points))
            locations[..., level, :, axis] = (whole + 0.1 + 0.8 * torch.rand(whole.shape) + 0.5) / size
    return value, locations, torch.randn(batch, queries, heads, len(shapes), points, dtype=torch.float64)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("points", [1, 4])
@pytest.mark.parametrize("shapes", [SHAPES, SHAPES[:1]])
def test_float64_agrees_with_a_loop(shapes: Shapes, points: int, heads: int) -> None:
    value, locations, weights = make_inputs(2, 7, heads, points, 5, shapes)
    sampled = deformable_attention(value, shapes, locations, weights)
    np.testing.assert_allclose(sampled.numpy(), oracle(value, shapes, locations, weights), rtol=1e-10, atol=1e-11)


def test_float32_stays_near_float64() -> None:
    value, locations, weights = (tensor.float() for tensor in make_inputs(2, 7, 2, 4, 5, SHAPES))
    sampled = deformable_attention(value, SHAPES, locations, weights)
    assert sampled.dtype == torch.float32
    np.testing.assert_allclose(sampled.double().numpy(), oracle(value, SHAPES, locations, weights), atol=1e-4)


def test_a_point_at_a_pixel_centre_reads_that_pixel_of_that_level() -> None:
    value = torch.randn(1, 21, 2, 3)
    for pixel, (level, row, column) in enumerate((s, r, c) for s, (h, w) in enumerate(SHAPES) for r in range(h) for c in range(w)):
        height, width = SHAPES[level]
        locations = torch.zeros(1, 1, 2, 3, 1, 2)
        locations[..., 0], locations[..., 1] = (column + 0.5) / width, (row + 0.5) / height
        weights = torch.zeros(1, 1, 2, 3, 1)
        weights[:, :, :, level] = 1
        torch.testing.assert_close(deformable_attention(value, SHAPES, locations, weights)[0, 0], value[0, pixel].flatten())


def test_gradients() -> None:
    inputs = [tensor.requires_grad_() for tensor in make_inputs(1, 2, 2, 2, 3, SHAPES)]
    assert torch.autograd.gradcheck(lambda value, at, weights: deformable_attention(value, SHAPES, at, weights), inputs)


def test_strides_of_the_inputs_do_not_matter() -> None:
    value, locations, weights = make_inputs(2, 7, 2, 3, 4, SHAPES)
    packed = deformable_attention(value, SHAPES, locations, weights)
    strided = deformable_attention(
        value.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        torch.tensor(SHAPES).tolist(),
        locations.transpose(0, 4).contiguous().transpose(0, 4),
        weights.mT.contiguous().mT,
    )
    torch.testing.assert_close(strided, packed)


def test_no_images_give_an_empty_result() -> None:
    assert deformable_attention(*_split(make_inputs(0, 7, 2, 3, 4, SHAPES))).shape == (0, 7, 8)


def _split(inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, list[tuple[int, int]], Tensor, Tensor]:
    return inputs[0], SHAPES, inputs[1], inputs[2]


def raw_inputs(*, images: int = 2, dtype: torch.dtype = torch.float64, shapes: Shapes = SHAPES) -> tuple[Tensor, ...]:
    """Value, reference points, offsets and logits."""
    samples = (images, 7, 2, len(shapes), 3)
    value = torch.randn(images, sum(rows * columns for rows, columns in shapes), 2, 4, dtype=dtype)
    return value, torch.rand(7, 2, dtype=dtype), torch.randn(*samples, 2, dtype=dtype), torch.randn(samples, dtype=dtype)


def test_offsets_are_pixels_from_the_reference_point_and_logits_share_one() -> None:
    value, points, offsets, logits = raw_inputs()
    size = torch.tensor([[(columns, rows)] for rows, columns in SHAPES], dtype=torch.float64)
    locations = points[:, None, None, None] + offsets / size
    weights = logits.exp() / logits.exp().sum((-2, -1), keepdim=True)
    found = deformable_attention_from_offsets(value, SHAPES, points, offsets, logits)
    torch.testing.assert_close(found, deformable_attention(value, SHAPES, locations, weights))
    for_each = points[None, :, None].expand(2, -1, len(SHAPES), -1)
    assert torch.equal(deformable_attention_from_offsets(value, SHAPES, for_each, offsets, logits), found)


def test_gradients_from_offsets() -> None:
    value, points, offsets, logits = (tensor.requires_grad_() for tensor in raw_inputs(images=1, shapes=SHAPES[:2]))
    assert torch.autograd.gradcheck(
        lambda v, p, o, a: deformable_attention_from_offsets(v, SHAPES[:2], p, o, a), (value, points, offsets, logits)
    )


def test_half_precision_is_sampled_at_exact_positions() -> None:
    """A position in bfloat16 would be off by a pixel of 256."""
    value, points, offsets, logits = (tensor.bfloat16() for tensor in raw_inputs(shapes=[(1, 1000)]))
    points = points.float()
    wanted = deformable_attention_from_offsets(value.float(), [(1, 1000)], points, offsets.float(), logits.float(), backend="reference")
    for backend in ("reference", None):
        found = deformable_attention_from_offsets(value, [(1, 1000)], points, offsets, logits, backend=backend)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), wanted, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_opcheck(backend: str | None) -> None:
    value, points, offsets, logits = raw_inputs(dtype=torch.float32)
    sizes = [size for shape in SHAPES for size in shape]
    reference_points = points[None, :, None].expand(2, -1, len(SHAPES), -1).contiguous()
    operators = torch.ops.emca
    torch.library.opcheck(operators.deformable_attention.default, (value, sizes, offsets, logits, backend))
    torch.library.opcheck(operators.deformable_attention_from_offsets.default, (value, sizes, reference_points, offsets, logits, backend))
    gradient = torch.randn(2, 7, 8)
    torch.library.opcheck(operators.deformable_attention_backward.default, (gradient, value, sizes, offsets, logits, backend))


class Sampler(nn.Module):
    """Maps to samples, with sizes of the maps' own."""

    def forward(self, fine: Tensor, coarse: Tensor, points: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        shapes = [(level.shape[-2], level.shape[-1]) for level in (fine, coarse)]
        value = torch.cat([level.flatten(2).mT for level in (fine, coarse)], 1).unflatten(-1, (2, 4))
        return deformable_attention_from_offsets(value, shapes, points, offsets, logits)


def maps(size: int) -> list[Tensor]:
    """Arguments of a `Sampler`."""
    _, points, offsets, logits = raw_inputs(dtype=torch.float32, shapes=SHAPES[:2])
    return [torch.randn(2, 8, size, size + 3), torch.randn(2, 8, size // 2, 5), points, offsets, logits]


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # torch's compiler does so
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph_and_for_other_sizes(dynamic: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(Sampler(), fullgraph=True, dynamic=dynamic, backend=counter)
    for size in (20, 9, 14) if dynamic else (6,):
        arguments = [argument.requires_grad_() for argument in maps(size)]
        outcomes = []
        for call in (Sampler(), compiled):
            result = call(*arguments)
            outcomes.append((result, *torch.autograd.grad(result.square().sum(), arguments)))
        for one, other in zip(*outcomes, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_is_exported() -> None:
    arguments = tuple(maps(6))
    sizes = {2: torch.export.Dim("rows", min=4, max=64), 3: torch.export.Dim("columns", min=4, max=64)}
    exported = torch.export.export(Sampler(), arguments, dynamic_shapes=(sizes, None, None, None, None))
    assert any("emca.deformable_attention_from_offsets" in str(node.target) for node in exported.graph.nodes)
    other = (torch.randn(2, 8, 11, 7), *arguments[1:])
    torch.testing.assert_close(exported.module()(*other), Sampler()(*other))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_are_two_per_corner_and_channel(device: str) -> None:
    value, points, offsets, logits = (tensor.to(device) for tensor in raw_inputs(dtype=torch.float32))

    def count(call: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    once = 2 * 4 * (2 * 7 * 2 * 3 * 3) * 4
    assert count(lambda: deformable_attention(value, SHAPES, offsets, logits)) == once
    value.requires_grad_()
    assert count(lambda: deformable_attention_from_offsets(value, SHAPES, points, offsets, logits).sum().backward()) == 3 * once


def test_the_backward_pass_follows_the_backend_that_was_asked_for() -> None:
    value, points, offsets, logits = raw_inputs(dtype=torch.float32)
    with record_backends() as served:
        deformable_attention_from_offsets(value.requires_grad_(), SHAPES, points, offsets, logits, backend="reference").sum().backward()
    assert served == {"deformable_attention": "reference (asked for by backend)"}


def test_atomics_are_refused_where_determinism_is_asked_for() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match=r"adds to the gradient of value in no fixed order.*use_deterministic_algorithms"):
            op._alert_any_order()
        torch.use_deterministic_algorithms(True, warn_only=True)
        with pytest.warns(UserWarning, match="in no fixed order"):
            op._alert_any_order()
        # the other backends keep their order
        value, points, offsets, logits = raw_inputs(dtype=torch.float32)
        torch.use_deterministic_algorithms(True)
        deformable_attention_from_offsets(value.requires_grad_(), SHAPES, points, offsets, logits).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    op._alert_any_order()


def test_values_beyond_32_bit_offsets_are_left_to_the_reference() -> None:
    value = torch.zeros(1).expand(1, 2**22, 8, 64)
    name, reason = explain_backend("deformable_attention", value, None)
    assert name == "reference"
    assert "2147483648 values, 2^31 or more" in reason or library.unavailable()


@pytest.mark.parametrize("queries", [0, 7])
@pytest.mark.parametrize("images", [0, 2])
def test_empty_calls(images: int, queries: int) -> None:
    value, points, offsets, logits = raw_inputs(images=images, dtype=torch.float32)
    leaves = [value, points[:queries], offsets[:, :queries], logits[:, :queries]]
    for leaf in leaves:
        leaf.requires_grad_()
    result = deformable_attention_from_offsets(leaves[0], SHAPES, *leaves[1:])
    assert result.shape == (images, queries, 8)
    assert [gradient.shape for gradient in torch.autograd.grad(result.sum(), leaves)] == [leaf.shape for leaf in leaves]
