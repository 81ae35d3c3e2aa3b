"""The two baselines against softmax attention written with loops over heads and queries."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from emca_bench.models import CrossAttention, build_attention

WIDTH, SHAPE, QUERIES = 16, (3, 7), 5


def make_inputs() -> list[Tensor]:
    allowed = torch.rand(2, QUERIES, 21) < 0.4
    allowed[:, 1] = False
    return [*(torch.randn(2, count, WIDTH, dtype=torch.float64) for count in (QUERIES, QUERIES, 21, 21)), allowed]


def formula(module: CrossAttention, inputs: list[Tensor], heads: int) -> Tensor:
    queries, query_pos, features, feature_pos, allowed = inputs
    weights = dict(module.named_parameters())
    weight_q, weight_k, weight_v = weights["in_proj_weight"].view(3, WIDTH, WIDTH)
    bias_q, bias_k, bias_v = weights["in_proj_bias"].view(3, WIDTH)
    part = WIDTH // heads
    attended = torch.empty_like(queries)
    for b in range(2):
        asked = (queries[b] + query_pos[b]) @ weight_q.T + bias_q
        keys = (features[b] + feature_pos[b]) @ weight_k.T + bias_k
        values = features[b] @ weight_v.T + bias_v
        for q in range(QUERIES):
            seen = allowed[b, q] if allowed[b, q].any() else torch.ones(21, dtype=torch.bool)
            for m in range(heads):
                channels = slice(m * part, (m + 1) * part)
                scores = keys[seen][:, channels] @ asked[q, channels] / math.sqrt(part)
                shares = scores.exp() / scores.exp().sum()
                attended[b, q, channels] = shares @ values[seen][:, channels]
    return queries + attended @ weights["out_proj.weight"].T + weights["out_proj.bias"]


def make(name: str, heads: int) -> CrossAttention:
    module = build_attention(name, width=WIDTH, heads=heads).double()
    for parameter in module.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("name", ["masked", "masked_fused"])
def test_softmax_formula(name: str, heads: int) -> None:
    module, inputs = make(name, heads), make_inputs()
    torch.testing.assert_close(module(*inputs, shape=SHAPE), formula(module, inputs, heads), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize("masked", [True, False])
def test_published_and_fused_are_the_same_function_with_the_same_gradients(masked: bool, heads: int) -> None:
    published, fused = make("masked", heads), make("masked_fused", heads)
    fused.load_state_dict(published.state_dict())
    *tensors, allowed = make_inputs()
    upstream = torch.randn(2, QUERIES, WIDTH, dtype=torch.float64)
    results = []
    for module in (published, fused):
        given = [tensor.clone().requires_grad_() for tensor in tensors]
        attended = module(*given, allowed if masked else None, shape=SHAPE)
        (attended * upstream).sum().backward()
        results.append([attended, *(tensor.grad for tensor in given), *(parameter.grad for parameter in module.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def test_values_carry_no_position() -> None:
    """With one pixel in sight attention is that pixel's value, wherever it lies."""
    module, (queries, query_pos, features, feature_pos, allowed) = make("masked_fused", 2), make_inputs()
    allowed[:] = False
    allowed[..., 4] = True
    here = module(queries, query_pos, features, feature_pos, allowed, shape=SHAPE)
    torch.testing.assert_close(module(queries, query_pos, features, feature_pos + 3, allowed, shape=SHAPE), here)
    assert not torch.allclose(module(queries, query_pos, features + 3, feature_pos, allowed, shape=SHAPE), here)


def test_parameters_are_named_as_in_published_checkpoints() -> None:
    names = {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}
    assert {*make("masked", 8).state_dict()} == {*make("masked_fused", 8).state_dict()} == names
