"""EMCA against its formula written with loops, its exact rewrites, and every switch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from emca_kernels.backends import record_backends
from torch import Tensor

from emca_bench.errors import UsageError
from emca_bench.models import build_attention
from emca_bench.models.attention.emca import EMCA

WIDTH, SHAPE, QUERIES = 16, (3, 7), 5
PIXELS = SHAPE[0] * SHAPE[1]
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}


def make(name: str = "emca", **switches: Any) -> EMCA:
    """A module whose biases and alpha are no longer neutral."""
    module = build_attention(name, width=WIDTH, **switches).double()
    assert isinstance(module, EMCA)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter)
    return module


def make_inputs(batch: int = 2) -> list[Tensor]:
    """Queries and features with their positions, and a mask under which query 1 of each image may look nowhere."""
    allowed = torch.rand(batch, QUERIES, PIXELS) < 0.4
    allowed[..., 6] = True
    allowed[:, 1] = False
    return [*(torch.randn(batch, count, WIDTH, dtype=torch.float64) for count in (QUERIES, QUERIES, PIXELS, PIXELS)), allowed]


def run(module: EMCA, inputs: Sequence[Tensor | None]) -> Tensor:
    return module(*inputs, shape=SHAPE)


def outcome(module: EMCA, inputs: list[Tensor], upstream: Tensor) -> dict[str, Tensor]:
    """The result and every gradient."""
    *tensors, allowed = inputs
    given = [tensor.clone().requires_grad_() for tensor in tensors]
    module.zero_grad()
    attended = run(module, [*given, allowed])
    (attended * upstream).sum().backward()
    found: dict[str, Tensor] = {"attended": attended.detach()}
    for name, tensor in [*zip(("queries", "query_pos", "features", "feature_pos"), given, strict=True), *module.named_parameters()]:
        assert tensor.grad is not None, name
        found[name] = tensor.grad.clone()
    return found


def chosen_pixels(module: EMCA, inputs: list[Tensor], image: int, query: int) -> list[int]:
    """Pixels that the gradient of one query's result reaches."""
    queries, query_pos, features, feature_pos, allowed = inputs
    given = features.clone().requires_grad_()
    attended = run(module, [queries, query_pos, given, feature_pos, allowed])
    (gradient,) = torch.autograd.grad((attended[image, query] * torch.randn(WIDTH, dtype=torch.float64)).sum(), given)
    assert not gradient[[other for other in range(len(gradient)) if other != image]].any()
    return gradient[image].any(-1).nonzero().flatten().tolist()


def prototype(module: EMCA, keys: Tensor, query: Tensor, seen: Tensor) -> Tensor:
    """Row of one query by the definition of each selection, head by head."""
    part = WIDTH // module.heads
    result = torch.empty(WIDTH, dtype=torch.float64)
    scales = module.log_scale.exp().expand(module.heads) if hasattr(module, "log_scale") else torch.ones(module.heads)
    candidates = seen.nonzero().flatten() if seen.any() else torch.arange(PIXELS)
    for m in range(module.heads):
        channels = slice(m * part, (m + 1) * part)
        rows = keys[candidates][:, channels]
        scores = rows @ query[channels]
        best = sorted(range(len(candidates)), key=lambda i: -scores[i].item())[: module.prototypes]
        if module.selection == "argmax":
            result[channels] = rows[best[0]]
        elif module.selection == "topk_mean":
            result[channels] = rows[best].mean(0)
        elif module.selection == "topk_softmax":
            shares = (scores[best] / math.sqrt(part)).exp()
            result[channels] = (shares / shares.sum()) @ rows[best]
        elif module.selection == "mean":
            result[channels] = rows.mean(0)
        elif module.selection == "softmax":
            shares = (scales[m] * scores).exp()
            result[channels] = (shares / shares.sum()) @ rows
        elif module.selection == "pool_and_prototype":
            result[channels] = (rows[best[0]] + rows.mean(0)) / 2
    return result


def formula(module: EMCA, inputs: list[Tensor]) -> Tensor:
    """SPEC section 1, literally: one image and one query at a time."""
    queries, query_pos, features, feature_pos, allowed = inputs
    result = torch.empty_like(queries)
    for b in range(len(queries)):
        located = features[b] + feature_pos[b]
        weight, bias = module.key_projection.weight, module.key_projection.bias
        for q in range(QUERIES):
            projected = module.query_projection.weight @ (queries[b, q] + query_pos[b, q]) + module.query_projection.bias
            if module.head_split == "features":
                row = weight @ prototype(module, located, projected @ weight, allowed[b, q]) + bias
            else:
                row = prototype(module, located @ weight.T + bias, projected, allowed[b, q])
            product = projected * row
            if module.product_projection is not None:
                product = module.product_projection.weight @ product + module.product_projection.bias
            length = product.square().sum().sqrt() if module.norm_axis == "row" else 1.0
            reweighted = row if module.alpha is None else module.alpha * product / length + row
            residual = projected if module.residual == "projected" else queries[b, q]
            result[b, q] = module.out_projection.weight @ reweighted + module.out_projection.bias + residual
    return result


SELECTIONS = [
    ("argmax", 1),
    ("topk_mean", 1),
    ("topk_mean", 3),
    ("topk_softmax", 1),
    ("topk_softmax", 3),
    ("mean", 1),
    ("softmax", 1),
    ("pool_and_prototype", 1),
]


def test_the_preset_is_the_paper() -> None:
    module, inputs = make(), make_inputs()
    assert (module.heads, module.prototypes, module.selection, module.residual) == (1, 1, "argmax", "projected")
    torch.testing.assert_close(run(module, inputs), formula(module, inputs), **CLOSE)


@pytest.mark.parametrize("folded", [True, False, None])
@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize(("selection", "prototypes"), SELECTIONS)
def test_every_selection_follows_its_formula(selection: str, prototypes: int, heads: int, folded: bool | None) -> None:
    module, inputs = make(selection=selection, prototypes=prototypes, heads=heads, folded=folded), make_inputs()
    torch.testing.assert_close(run(module, inputs), formula(module, inputs), **CLOSE)


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize(("selection", "prototypes"), SELECTIONS)
def test_heads_over_features_follow_the_formula(selection: str, prototypes: int, heads: int) -> None:
    module = make(selection=selection, prototypes=prototypes, heads=heads, head_split="features")
    inputs = make_inputs()
    torch.testing.assert_close(run(module, inputs), formula(module, inputs), **CLOSE)


@pytest.mark.parametrize("selection", ["argmax", "softmax", "pool_and_prototype"])
@pytest.mark.parametrize("norm_axis", ["row", "none"])
@pytest.mark.parametrize("product", ["projected", "plain"])
@pytest.mark.parametrize("alpha", ["learned", "one", "zero"])
def test_every_tail_follows_the_formula(alpha: str, product: str, norm_axis: str, selection: str) -> None:
    """With a gradient for every parameter that there is, and none for a constant."""
    module = make(alpha=alpha, product=product, norm_axis=norm_axis, selection=selection)
    inputs = make_inputs()
    torch.testing.assert_close(run(module, inputs), formula(module, inputs), **CLOSE)
    found = outcome(module, inputs, torch.randn(2, QUERIES, WIDTH, dtype=torch.float64))
    assert ("alpha" in found) == (alpha == "learned")
    assert ("product_projection.weight" in found) == (product == "projected" and alpha != "zero")
    assert all(gradient.any() for gradient in found.values())
    if alpha == "one":
        assert module.alpha is not None
        assert torch.equal(module.alpha, torch.ones_like(module.alpha))


@pytest.mark.parametrize(
    "switches", [{}, {"selection": "softmax", "temperature": "per_head"}, {"selection": "pool_and_prototype"}], ids=str
)
def test_one_head_over_features_is_one_head_over_keys(switches: dict[str, Any]) -> None:
    features, keys = make(head_split="features", **switches), make(folded=True, **switches)
    keys.load_state_dict(features.state_dict())
    inputs, upstream = make_inputs(), torch.randn(2, QUERIES, WIDTH, dtype=torch.float64)
    wanted = outcome(keys, inputs, upstream)
    for name, value in outcome(features, inputs, upstream).items():
        torch.testing.assert_close(value, wanted[name], **CLOSE, msg=name)


@pytest.mark.parametrize(("head_split", "folded"), [("keys", True), ("keys", False), ("keys", None), ("features", None)])
def test_every_head_has_a_temperature_of_its_own(head_split: str, folded: bool | None) -> None:
    module = make("emca", selection="softmax", heads=4, temperature="per_head", head_split=head_split, folded=folded)
    assert module.log_scale.shape == (4,)
    inputs = make_inputs()
    torch.testing.assert_close(run(module, inputs), formula(module, inputs), **CLOSE)
    found = outcome(module, inputs, torch.randn(2, QUERIES, WIDTH, dtype=torch.float64))
    assert found["log_scale"].all()


def test_a_fixed_temperature_is_no_parameter_and_starts_where_it_is_told() -> None:
    module = make("emca_soft", temperature="fixed", temperature_start=0.25)
    assert module.log_scale.exp().item() == pytest.approx(4 / math.sqrt(WIDTH))
    assert not {name for name in (*dict(module.named_parameters()), *module.state_dict()) if "scale" in name}
    inputs = make_inputs()
    torch.testing.assert_close(run(module, inputs), formula(module, inputs), **CLOSE)


@pytest.mark.parametrize("selection", ["argmax", "pool_and_prototype"])
@pytest.mark.parametrize(("heads", "head_split"), [(1, "keys"), (2, "keys"), (4, "features")])
@pytest.mark.parametrize("folded", [True, None])
def test_straight_through_has_the_results_of_a_choice_and_the_gradients_of_a_softmax(
    selection: str, heads: int, head_split: str, folded: bool | None
) -> None:
    switches: dict[str, Any] = {"heads": heads, "head_split": head_split, "folded": folded, "alpha": "zero", "residual": "raw"}
    trained = make(selection=selection, selection_gradient="straight_through", **switches)
    hard = make(selection=selection, **{**switches, "residual": "projected"})
    soft = make("emca", selection="softmax", **switches)
    hard.load_state_dict(trained.state_dict(), strict=False)
    soft.load_state_dict(trained.state_dict())
    inputs, upstream = make_inputs(), torch.randn(2, QUERIES, WIDTH, dtype=torch.float64)
    # residuals differ, so that W_Q is trained in both
    chosen = run(hard, inputs) - hard.query_projection(inputs[0] + inputs[1]) + inputs[0]
    torch.testing.assert_close(run(trained, inputs), chosen, **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(run(trained, inputs), chosen, **CLOSE)
    found, wanted = (outcome(module, inputs, upstream) for module in (trained, soft))
    # without a product the tail is linear, and what reaches the prototypes does not depend on them
    share = 1 if selection == "argmax" else 0.5
    for name in ("query_pos", "query_projection.weight", "log_scale"):
        torch.testing.assert_close(found[name], share * wanted[name], **CLOSE, msg=name)
    if selection == "argmax":
        for name in ("features", "feature_pos", "queries", "key_projection.weight"):
            torch.testing.assert_close(found[name], wanted[name], **CLOSE, msg=name)
    if head_split == "keys":
        unfolded = make(selection=selection, selection_gradient="straight_through", **{**switches, "folded": False})
        unfolded.load_state_dict(trained.state_dict())
        for name, value in outcome(unfolded, inputs, upstream).items():
            torch.testing.assert_close(found[name], value, **CLOSE, msg=name)


def test_without_gradients_straight_through_is_one_operator_again() -> None:
    module = make(selection_gradient="straight_through", folded=True)
    inputs = make_inputs()
    with record_backends() as served:
        run(module, inputs)
    assert "emca_attention" not in served
    with torch.no_grad(), record_backends() as served:
        run(module, inputs)
    assert set(served) == {"emca_attention"}


@pytest.mark.parametrize(
    "switches",
    [
        {"alpha": "zero"},
        {"product": "plain"},
        {"norm_axis": "none"},
        {"selection": "pool_and_prototype"},
        {"selection": "softmax", "heads": 2, "head_split": "features"},
    ],
    ids=str,
)
def test_what_the_layers_operator_cannot_do_is_done_by_its_parts(switches: dict[str, Any]) -> None:
    """Whoever serves the parts: the fastest backend and the readable one agree, in single precision too."""
    module, inputs = make(folded=True, residual="projected", **switches), make_inputs()
    plain = make(folded=True, residual="projected", backend="reference", **switches)
    plain.load_state_dict(module.state_dict())
    with record_backends() as served:
        found = run(module.float(), [tensor.float() if tensor.is_floating_point() else tensor for tensor in inputs])
    assert served
    assert "emca_attention" not in served
    torch.testing.assert_close(found.double(), run(plain, inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize(("selection", "prototypes"), [*SELECTIONS, ("random", 1), ("random", 3)])
def test_folding_changes_neither_values_nor_gradients(selection: str, prototypes: int, heads: int) -> None:
    """With fewer allowed pixels than prototypes for one query, none for another."""
    plain = make(selection=selection, prototypes=prototypes, heads=heads, folded=False)
    folded = make(selection=selection, prototypes=prototypes, heads=heads, folded=True)
    folded.load_state_dict(plain.state_dict())
    inputs, upstream = make_inputs(), torch.randn(2, QUERIES, WIDTH, dtype=torch.float64)
    inputs[-1][:, 2] = False
    inputs[-1][:, 2, 4:6] = True
    outcomes = []
    for module in (plain, folded):
        torch.manual_seed(5)
        outcomes.append(outcome(module, inputs, upstream))
    assert outcomes[0].keys() == outcomes[1].keys()
    for name, value in outcomes[0].items():
        assert torch.allclose(outcomes[1][name], value, **CLOSE), name


@pytest.mark.parametrize("switches", [{}, {"local_conv": True}, {"query_norm": True}, {"positions": False}, {"empty_mask": "first_pixel"}])
def test_folding_goes_with_every_other_switch(switches: dict[str, Any]) -> None:
    plain, folded = make(folded=False, **switches), make(folded=True, **switches)
    folded.load_state_dict(plain.state_dict())
    inputs = make_inputs()
    torch.testing.assert_close(run(folded, inputs), run(plain, inputs), **CLOSE)


@pytest.mark.parametrize("selection", ["topk_mean", "topk_softmax"])
def test_the_best_one_of_topk_is_argmax(selection: str) -> None:
    best, topk = make(), make(selection=selection, prototypes=1)
    topk.load_state_dict(best.state_dict())
    inputs = make_inputs()
    assert torch.equal(run(topk, inputs), run(best, inputs))


@pytest.mark.parametrize("folded", [True, False])
def test_no_gradient_through_scores_or_choice(folded: bool) -> None:
    """Only the chosen row gets one, and a query moves it only through the element-wise product."""
    module, inputs = make(folded=folded, residual="raw"), make_inputs()
    queries, query_pos, features, feature_pos, allowed = inputs
    located = features + feature_pos
    projected = module.query_projection(queries + query_pos)
    scores = module.key_projection(located) @ projected.mT
    scores = scores.mT.masked_fill(~(allowed | ~allowed.any(-1, keepdim=True)), -torch.inf)
    for query in range(QUERIES):
        assert chosen_pixels(module, inputs, 0, query) == [scores[0, query].argmax().item()]
    module.product_projection.weight.data.zero_()
    given = queries.clone().requires_grad_()
    attended = run(module, [given, *inputs[1:]])
    (gradient,) = torch.autograd.grad((attended - given).sum(), given)
    assert not gradient.any()


@pytest.mark.parametrize("prototypes", [1, 4])
@pytest.mark.parametrize("folded", [True, False])
def test_random_prototypes_are_allowed_and_differ_between_calls(folded: bool, prototypes: int) -> None:
    module, inputs = make(selection="random", prototypes=prototypes, folded=folded), make_inputs()
    allowed = inputs[-1]
    drawn = [[chosen_pixels(module, inputs, 0, query) for query in range(QUERIES)] for _ in range(5)]
    assert len({str(draw) for draw in drawn}) > 1
    for draw in drawn:
        for query, pixels in enumerate(draw):
            sight = allowed[0, query].nonzero().flatten().tolist() or list(range(PIXELS))
            assert {*pixels} <= {*sight}
            assert len(pixels) == min(prototypes, len(sight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_prototypes_are_uniform_in_every_dtype(dtype: torch.dtype) -> None:
    module = build_attention("emca", width=8, selection="random").to(dtype)
    assert isinstance(module, EMCA)
    pixels, queries = 4096, 2000
    drawn = module._choose(torch.zeros(1, pixels, 8, dtype=dtype), torch.zeros(1, queries, 8, dtype=dtype), None, heads=1).indices_BQMK
    # standard error of the mean of a uniform draw: pixels / sqrt(12 * queries)
    assert abs(drawn.double().mean().item() - pixels / 2) < 6 * pixels / math.sqrt(12 * queries)


def test_the_residual_is_the_projected_or_the_raw_query() -> None:
    projected, raw = make(residual="projected"), make(residual="raw")
    raw.load_state_dict(projected.state_dict())
    inputs = make_inputs()
    located = projected.query_projection(inputs[0] + inputs[1])
    torch.testing.assert_close(run(projected, inputs) - located, run(raw, inputs) - inputs[0], **CLOSE)


def test_without_positions_they_are_not_read() -> None:
    located, plain = make(), make(positions=False)
    plain.load_state_dict(located.state_dict())
    queries, query_pos, features, feature_pos, allowed = make_inputs()
    without = run(located, [queries, None, features, None, allowed])
    torch.testing.assert_close(run(plain, [queries, query_pos, features, feature_pos, allowed]), without, **CLOSE)
    assert not torch.allclose(run(located, [queries, query_pos, features, feature_pos, allowed]), without)


@pytest.mark.parametrize("norm_axis", ["row", "queries"])
def test_only_the_norm_over_queries_couples_them(norm_axis: str) -> None:
    module, inputs = make(norm_axis=norm_axis), make_inputs()
    before = run(module, inputs)
    inputs[0][:, 3] += 0.5
    changed = ((run(module, inputs) - before).abs() > 1e-12).any(-1)
    assert changed[0].tolist() == [norm_axis == "queries" or query == 3 for query in range(QUERIES)]


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("folded", [True, False])
def test_what_an_empty_mask_chooses(folded: bool, heads: int) -> None:
    everywhere, first = (make(empty_mask=rule, folded=folded, heads=heads) for rule in ("everywhere", "first_pixel"))
    first.load_state_dict(everywhere.state_dict())
    inputs = make_inputs(3)
    # pixel 0 is nobody's best, so that choosing it is the rule's doing
    inputs[2][:, 0] = 0
    inputs[3][:, 0] = 0
    inputs[-1][1] = False
    unmasked = [*inputs[:-1], torch.ones_like(inputs[-1])]
    assert chosen_pixels(everywhere, inputs, 0, 1) == chosen_pixels(everywhere, unmasked, 0, 1)
    assert chosen_pixels(first, inputs, 0, 1) == [0]
    for query in range(QUERIES):
        assert chosen_pixels(first, inputs, 1, query) == chosen_pixels(everywhere, unmasked, 1, query)
        if query != 1:
            assert chosen_pixels(first, inputs, 0, query) == chosen_pixels(everywhere, inputs, 0, query)


def test_first_pixel_holds_for_every_prototype_of_an_empty_query() -> None:
    module, inputs = make(selection="topk_mean", prototypes=3, empty_mask="first_pixel"), make_inputs()
    assert chosen_pixels(module, inputs, 0, 1) == [0]
    assert len(chosen_pixels(module, inputs, 0, 0)) == min(3, int(inputs[-1][0, 0].sum()))


def test_an_identity_start_keeps_the_queries_in_the_projected_residual() -> None:
    module = build_attention("emca", width=WIDTH, query_init="identity").double()
    raw = build_attention("emca", width=WIDTH, query_init="identity", residual="raw").double()
    raw.load_state_dict(module.state_dict())
    queries, _, features, feature_pos, allowed = make_inputs()
    inputs = [queries, None, features, feature_pos, allowed]
    assert torch.equal(module.query_projection.weight, torch.eye(WIDTH, dtype=torch.float64))  # type: ignore[union-attr, arg-type]
    torch.testing.assert_close(module(*inputs, shape=SHAPE), raw(*inputs, shape=SHAPE), **CLOSE)


@pytest.mark.parametrize("heads", [1, 4])
def test_normalised_keys_forget_the_length_of_features(heads: int) -> None:
    normal, plain = make(normalize_keys=True, heads=heads), make(heads=heads, folded=False)
    plain.load_state_dict(normal.state_dict())
    for module in (normal, plain):
        module.key_projection.bias.data.zero_()
    queries, query_pos, features, _, allowed = make_inputs()
    lengths = 0.2 + 5 * torch.rand(2, PIXELS, 1, dtype=torch.float64)
    torch.testing.assert_close(normal.keys(features).square().sum(-1), torch.ones(2, PIXELS, dtype=torch.float64))
    same, other = [queries, query_pos, features, None, allowed], [queries, query_pos, features * lengths, None, allowed]
    torch.testing.assert_close(run(normal, same), run(normal, other), **CLOSE)
    assert not torch.allclose(run(plain, same), run(plain, other))


def test_normalised_queries_forget_their_length_before_the_tail() -> None:
    module = make(normalize_keys=True, residual="raw")
    module.query_projection.bias.data.zero_()
    queries, _, features, feature_pos, allowed = make_inputs()
    update = run(module, [queries, None, features, feature_pos, allowed]) - queries
    torch.testing.assert_close(run(module, [3 * queries, None, features, feature_pos, allowed]) - 3 * queries, update, **CLOSE)


@pytest.mark.parametrize("training", [True, False])
def test_the_local_convolution_is_a_batch_norm_and_a_depth_wise_convolution(training: bool) -> None:
    module, inputs = make(local_conv=True), make_inputs()
    assert module.local_conv is not None
    norm, conv = module.local_conv.norm, module.local_conv.conv
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert conv.bias is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    module.train(training)
    located = inputs[2] + inputs[3]
    if training:
        mean, variance = located.mean((0, 1)), located.var((0, 1), unbiased=False)
    else:
        mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    normal = (located - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias
    padded = torch.nn.functional.pad(normal.unflatten(1, SHAPE), (0, 0, 1, 1, 1, 1))
    source = conv.bias.expand(2, *SHAPE, WIDTH)
    for row, column in ((row, column) for row in range(3) for column in range(3)):
        source = source + padded[:, row : row + SHAPE[0], column : column + SHAPE[1]] * conv.weight[:, 0, row, column]
    plain = make()
    plain.load_state_dict({name: tensor for name, tensor in module.state_dict().items() if not name.startswith("local_conv")})
    wanted = run(plain, [inputs[0], inputs[1], source.flatten(1, 2), None, inputs[4]])
    torch.testing.assert_close(run(module, inputs), wanted, **CLOSE)


def test_the_query_norm_forgets_offset_and_scale_of_the_queries() -> None:
    module = make(query_norm=True, residual="raw")
    queries, _, features, feature_pos, allowed = make_inputs()
    update = run(module, [queries, None, features, feature_pos, allowed]) - queries
    moved = 2 * queries + 3
    torch.testing.assert_close(run(module, [moved, None, features, feature_pos, allowed]) - moved, update, rtol=1e-3, atol=1e-3)
    plain = make(residual="raw")
    plain.load_state_dict({name: tensor for name, tensor in module.state_dict().items() if not name.startswith("query_norm")})
    assert module.query_norm is not None
    normal = torch.nn.functional.layer_norm(queries, (WIDTH,)) * module.query_norm.weight + module.query_norm.bias
    torch.testing.assert_close(run(plain, [normal, None, features, feature_pos, allowed]) - normal, update, **CLOSE)


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("heads", [1, 2])
def test_a_cold_softmax_is_argmax(heads: int, folded: bool) -> None:
    soft = make("emca_soft", heads=heads, folded=folded)
    hard = make("emca", heads=heads, folded=folded, residual="raw")
    hard.load_state_dict({name: tensor for name, tensor in soft.state_dict().items() if name != "log_scale"})
    inputs = make_inputs()
    soft.log_scale.data.fill_(math.log(1e9))
    torch.testing.assert_close(run(soft, inputs), run(hard, inputs), rtol=1e-6, atol=1e-6)


def test_a_hot_softmax_is_mask_pooling() -> None:
    soft, mean = make("emca_soft", residual="raw"), make("mask_pooling", residual="raw")
    mean.load_state_dict({name: tensor for name, tensor in soft.state_dict().items() if name != "log_scale"})
    soft.log_scale.data.fill_(-60.0)
    inputs = make_inputs()
    torch.testing.assert_close(run(soft, inputs), run(mean, inputs), **CLOSE)


@pytest.mark.parametrize("heads", [1, 4])
def test_the_softmax_starts_at_the_temperature_of_attention(heads: int) -> None:
    soft = build_attention("emca_soft", width=WIDTH, heads=heads)
    assert isinstance(soft, EMCA)
    assert soft.log_scale.exp().item() == pytest.approx(1 / math.sqrt(WIDTH / heads))


@pytest.mark.parametrize("folded", [True, False])
def test_the_softmax_trains_temperature_and_scores(folded: bool) -> None:
    """All allowed pixels get a gradient, and without the product a query gets one through the scores alone."""
    module, inputs = make("emca_soft", folded=folded), make_inputs()
    module.log_scale.data.fill_(-1.0)
    sight = inputs[-1][0, 0].nonzero().flatten().tolist()
    assert chosen_pixels(module, inputs, 0, 0) == sight
    module.product_projection.weight.data.zero_()
    given = inputs[0].clone().requires_grad_()
    update = run(module, [given, *inputs[1:]]) - given
    (update * torch.randn_like(update)).sum().backward()
    assert given.grad is not None
    assert given.grad.any(-1).all()
    assert module.log_scale.grad is not None
    assert module.log_scale.grad.item() != 0


@pytest.mark.parametrize("pixels", [64, 199, 201, 4096])
@pytest.mark.parametrize("name", ["emca", "emca_soft", "mask_pooling", "pem_ca"])
def test_presets_fold_where_that_is_cheaper(name: str, pixels: int) -> None:
    automatic, plain = (build_attention(name, width=256, **switches) for switches in ({}, {"folded": False} if name != "pem_ca" else {}))
    assert isinstance(automatic, EMCA)
    # folding costs two projections of the queries (one for a mean) and saves one of the pixels
    pays = {"pem_ca": False, "mask_pooling": pixels > 100}.get(name, pixels > 200)
    cheaper = automatic.macs(pixels=pixels, queries=100) < plain.macs(pixels=pixels, queries=100)
    assert automatic._folds(pixels, 100) is pays
    assert cheaper is pays


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["emca", "emca_soft"])
def test_folding_by_default_takes_the_cheaper_form_of_many_pixels(name: str, heads: int) -> None:
    automatic, folded, plain = (build_attention(name, width=256, heads=heads, folded=folded) for folded in (None, True, False))
    cost = {module: module.macs(pixels=10**6, queries=100) for module in (automatic, folded, plain)}
    assert cost[automatic] == min(cost[folded], cost[plain])


@pytest.mark.parametrize("name", ["emca", "emca_soft", "mask_pooling"])
@pytest.mark.parametrize("folded", [False, True])
def test_the_backend_reaches_every_operator(name: str, folded: bool) -> None:
    attention = build_attention(name, width=32, folded=folded, backend="reference")
    with record_backends() as served:
        attention(torch.randn(2, 5, 32), None, torch.randn(2, 12, 32), torch.randn(12, 32), None, shape=(3, 4))
    parts = {"attend_prototypes", "select_prototypes" if name == "emca" else "pool_prototypes"}
    assert set(served) == ({"emca_attention"} if folded else parts)
    assert set(served.values()) == {"reference (asked for by backend)"}


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(UsageError, match="backend='natve' \\(did you mean 'native'\\?\\); expected one of reference"):
        build_attention("emca_soft", width=32, backend="natve")
