"""The element-wise attention against its formula, written with loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emca_kernels import attend_prototypes
from torch import Tensor

AXES = ("row", "queries")
ALL_AXES = (*AXES, "none")


def make_inputs(batch: int, queries: int, width: int, out: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    shapes = ((batch, queries, width), (batch, queries, width), (width, width), (width,), (width,), (out, width), (out,))
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


def oracle(inputs: tuple[Tensor, ...], norm_axis: str) -> np.ndarray:
    prototypes, queries, product_weight, product_bias, alpha, out_weight, out_bias = (tensor.double().numpy() for tensor in inputs)
    batch, count, width = prototypes.shape
    result = np.empty((batch, count, len(out_bias)))
    for b in range(batch):
        product = np.stack([product_weight @ (queries[b, q] * prototypes[b, q]) + product_bias for q in range(count)])
        for q in range(count):
            if norm_axis == "none":
                norm = np.ones(width)
            elif norm_axis == "row":
                norm = np.full(width, np.sqrt((product[q] ** 2).sum()))
            else:
                norm = np.sqrt((product**2).sum(0))
            reweighted = alpha * product[q] / np.maximum(norm, 1e-12) + prototypes[b, q]
            result[b, q] = out_weight @ reweighted + out_bias
    return result


@pytest.mark.parametrize("norm_axis", ALL_AXES)
@pytest.mark.parametrize(("queries", "width", "out"), [(1, 1, 1), (5, 7, 7), (37, 16, 9)])
def test_float64_agrees_with_the_formula(queries: int, width: int, out: int, norm_axis: str) -> None:
    inputs = make_inputs(2, queries, width, out)
    attended = attend_prototypes(*inputs, norm_axis=norm_axis)
    np.testing.assert_allclose(attended.numpy(), oracle(inputs, norm_axis), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("norm_axis", ALL_AXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_stays_near_float64(dtype: torch.dtype, norm_axis: str) -> None:
    inputs = make_inputs(2, 9, 16, 12, dtype)
    attended = attend_prototypes(*inputs, norm_axis=norm_axis)
    assert attended.dtype == dtype
    wanted = oracle(inputs, norm_axis)
    assert np.abs(attended.double().numpy() - wanted).max() <= 32 * torch.finfo(dtype).eps * np.abs(wanted).max()


def test_the_norm_over_a_row_is_the_default() -> None:
    inputs = make_inputs(1, 3, 4, 4)
    assert torch.equal(attend_prototypes(*inputs), attend_prototypes(*inputs, norm_axis="row"))


@pytest.mark.parametrize("norm_axis", ALL_AXES)
def test_only_the_norm_over_queries_couples_them(norm_axis: str) -> None:
    prototypes, queries, *rest = make_inputs(1, 6, 8, 8)
    before = attend_prototypes(prototypes, queries, *rest, norm_axis=norm_axis)
    queries[:, 2] += 1
    changed = (attend_prototypes(prototypes, queries, *rest, norm_axis=norm_axis) != before).any(-1)[0]
    assert changed.tolist() == [norm_axis == "queries" or query == 2 for query in range(6)]


@pytest.mark.parametrize("norm_axis", ALL_AXES)
def test_gradients(norm_axis: str) -> None:
    inputs = tuple(tensor.requires_grad_() for tensor in make_inputs(2, 3, 4, 5))
    assert torch.autograd.gradcheck(lambda *given: attend_prototypes(*given, norm_axis=norm_axis), inputs)


@pytest.mark.parametrize("norm_axis", ALL_AXES)
def test_without_a_projection_the_product_stays_as_it_is(norm_axis: str) -> None:
    prototypes, queries, _, _, *rest = (tensor.requires_grad_() for tensor in make_inputs(2, 3, 4, 5))
    eye, zero = torch.eye(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    wanted = attend_prototypes(prototypes, queries, eye, zero, *rest, norm_axis=norm_axis)
    torch.testing.assert_close(attend_prototypes(prototypes, queries, None, None, *rest, norm_axis=norm_axis), wanted)
    assert torch.autograd.gradcheck(
        lambda *given: attend_prototypes(*given[:2], None, None, *given[2:], norm_axis=norm_axis), (prototypes, queries, *rest)
    )
    with pytest.raises(ValueError, match="product_bias is None but product_weight is not, expected both or neither"):
        attend_prototypes(prototypes, queries, eye, None, *rest)
    with pytest.raises(ValueError, match="product_weight is None but product_bias is not, expected both or neither"):
        attend_prototypes(prototypes, queries, None, zero, *rest)


def with_zero_norm(norm_axis: str, dtype: torch.dtype) -> list[Tensor]:
    """Inputs whose product is exactly zero in row 1, or in channel 4 of every query."""
    prototypes, queries, product_weight, product_bias, alpha, out_weight, out_bias = make_inputs(1, 3, 8, 8, dtype)
    product_bias.zero_()
    if norm_axis == "row":
        queries[:, 1] = 0
    else:
        product_weight[4] = 0
    return [prototypes, queries, product_weight, product_bias, alpha, out_weight, out_bias]


@pytest.mark.parametrize("norm_axis", AXES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_product_of_zero_adds_nothing(dtype: torch.dtype, norm_axis: str) -> None:
    inputs = with_zero_norm(norm_axis, dtype)
    inputs[5:] = torch.eye(8, dtype=dtype), torch.zeros(8, dtype=dtype)
    share = attend_prototypes(*inputs, norm_axis=norm_axis) - inputs[0]
    dead, alive = (share[:, 1], share[:, 0]) if norm_axis == "row" else (share[..., 4], share[..., 3])
    assert not dead.any()
    assert share.isfinite().all()
    assert alive.any()


@pytest.mark.parametrize("norm_axis", AXES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_at_a_product_of_zero_are_finite(dtype: torch.dtype, norm_axis: str) -> None:
    inputs = [tensor.requires_grad_() for tensor in with_zero_norm(norm_axis, dtype)]
    attend_prototypes(*inputs, norm_axis=norm_axis).sum().backward()
    for tensor in inputs:
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize("norm_axis", AXES)
@pytest.mark.parametrize("size", [1e-13, 1e-11])
def test_the_norm_is_clamped_at_1e_12(size: float, norm_axis: str) -> None:
    prototypes, queries, product_weight, product_bias, alpha, _, out_bias = make_inputs(1, 1, 4, 4)
    product_bias.zero_()[2] = size
    attended = attend_prototypes(
        prototypes, queries, product_weight.zero_(), product_bias, alpha, torch.eye(4, dtype=torch.float64), out_bias, norm_axis=norm_axis
    )
    share = attended - prototypes - out_bias
    wanted = torch.zeros(1, 1, 4, dtype=torch.float64)
    wanted[0, 0, 2] = alpha[2] * min(size / 1e-12, 1.0)
    torch.testing.assert_close(share, wanted)


def test_strides_of_the_inputs_do_not_matter() -> None:
    prototypes, queries, product_weight, product_bias, alpha, out_weight, out_bias = make_inputs(3, 5, 8, 6)
    packed = attend_prototypes(prototypes, queries, product_weight, product_bias, alpha, out_weight, out_bias)
    strided = attend_prototypes(
        prototypes.transpose(0, 1).contiguous().transpose(0, 1),
        queries.mT.contiguous().mT,
        product_weight.mT.contiguous().mT,
        torch.stack([product_bias, alpha], 1)[:, 0],
        torch.stack([product_bias, alpha], 1)[:, 1],
        out_weight.mT.contiguous().mT,
        out_bias,
    )
    torch.testing.assert_close(strided, packed)


def test_no_images_give_an_empty_result() -> None:
    assert attend_prototypes(*make_inputs(0, 3, 8, 6)).shape == (0, 3, 6)
