"""What every registered cross-attention must do, whatever it computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from emca_bench.errors import UsageError
from emca_bench.models import ATTENTIONS, CrossAttention, build_attention

WIDTH, SHAPE, QUERIES = 16, (3, 7), 5
PIXELS = SHAPE[0] * SHAPE[1]


def make(name: str) -> CrossAttention:
    return build_attention(name, width=WIDTH).double()


def make_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries and features with their positions, and a mask under which one query of each image may look nowhere."""
    allowed = torch.rand(2, QUERIES, PIXELS) < 0.4
    allowed[:, 1] = False
    tensors = (torch.randn(2, count, WIDTH, dtype=torch.float64) for count in (QUERIES, QUERIES, PIXELS, PIXELS))
    return (*tensors, allowed)  # type: ignore[return-value]


@pytest.mark.parametrize("name", ATTENTIONS)
def test_shape_and_dtype(name: str) -> None:
    attended = make(name)(*make_inputs(), shape=SHAPE)
    assert attended.shape == (2, QUERIES, WIDTH)
    assert attended.dtype == torch.float64


@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_gradient_reaches_every_parameter_and_the_queries(name: str) -> None:
    module = make(name)
    queries, *rest = make_inputs()
    attended = module(queries.requires_grad_(), *rest, shape=SHAPE)
    (attended * torch.randn_like(attended)).sum().backward()
    assert queries.grad is not None
    assert queries.grad.any()
    for path, parameter in module.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
        assert parameter.grad.any(), path


@pytest.mark.parametrize("name", ATTENTIONS)
def test_masks_and_positions_are_optional(name: str) -> None:
    module = make(name)
    queries, query_pos, features, feature_pos, allowed = make_inputs()
    for positions in ((query_pos, feature_pos), (None, feature_pos), (query_pos, None), (None, None)):
        for mask in (None, allowed):
            attended = module(queries, positions[0], features, positions[1], mask, shape=SHAPE)
            assert attended.shape == queries.shape
            assert attended.isfinite().all()


@pytest.mark.parametrize("name", ATTENTIONS)
def test_no_position_is_a_position_of_zero(name: str) -> None:
    module = make(name).eval()
    queries, _, features, _, allowed = make_inputs()
    zero = module(queries, torch.zeros_like(queries), features, torch.zeros_like(features), allowed, shape=SHAPE)
    torch.testing.assert_close(module(queries, None, features, None, allowed, shape=SHAPE), zero)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_positions_broadcast_over_images(name: str) -> None:
    module = make(name).eval()
    queries, query_pos, features, feature_pos, allowed = make_inputs()
    shared = module(queries, query_pos[0], features, feature_pos[0], allowed, shape=SHAPE)
    positions = query_pos[:1].expand_as(query_pos), feature_pos[:1].expand_as(feature_pos)
    torch.testing.assert_close(shared, module(queries, positions[0], features, positions[1], allowed, shape=SHAPE))


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("full", [True, False])
def test_a_full_mask_and_an_image_of_empty_masks_are_as_no_mask(name: str, full: bool) -> None:
    module = make(name).eval()
    *inputs, allowed = make_inputs()
    unmasked = module(*inputs, None, shape=SHAPE)
    torch.testing.assert_close(module(*inputs, torch.full_like(allowed, full), shape=SHAPE), unmasked)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_an_image_does_not_depend_on_the_others_of_its_batch(name: str) -> None:
    module = make(name).eval()
    inputs = make_inputs()
    together = module(*inputs, shape=SHAPE)
    alone = torch.cat([module(*(tensor[image : image + 1] for tensor in inputs), shape=SHAPE) for image in range(2)])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("name", [name for name in ATTENTIONS if name != "none"])
def test_blocked_pixels_do_not_matter_and_allowed_ones_do(name: str) -> None:
    module = make(name).eval()
    queries, query_pos, features, feature_pos, allowed = make_inputs()
    allowed[:] = False
    # far enough from the border of the map's right half that no local convolution reaches across
    allowed.unflatten(-1, SHAPE)[..., :4] = True
    before = module(queries, query_pos, features, feature_pos, allowed, shape=SHAPE)
    features.unflatten(-2, SHAPE)[:, :, 5:] += 1
    torch.testing.assert_close(module(queries, query_pos, features, feature_pos, allowed, shape=SHAPE), before)
    features.unflatten(-2, SHAPE)[:, :, :4] += torch.randn(2, SHAPE[0], 4, WIDTH, dtype=torch.float64)
    assert (module(queries, query_pos, features, feature_pos, allowed, shape=SHAPE) - before).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_same_seed_makes_the_same_weights(name: str) -> None:
    torch.manual_seed(3)
    first = build_attention(name, width=WIDTH).state_dict()
    torch.manual_seed(3)
    second = build_attention(name, width=WIDTH).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_no_cross_attention_returns_the_queries_and_has_no_parameters() -> None:
    module = make("none")
    inputs = make_inputs()
    assert torch.equal(module(*inputs, shape=SHAPE), inputs[0])
    assert not list(module.parameters())


@pytest.mark.parametrize(
    ("name", "switches", "message"),
    [
        ("emac", {}, "unknown attention 'emac' (did you mean 'emca'?); known: "),
        ("emca", {"residuals": "raw"}, "attention 'emca' has no switch 'residuals' (did you mean 'residual'?); its switches: "),
        ("none", {"heads": 4}, "attention 'none' has no switch 'heads'; its switches: none"),
        ("masked", {"heads": 5}, "heads=5 must divide the model width 16"),
        ("emca", {"heads": 0}, "heads=0 must divide the model width 16"),
        ("emca", {"selection": "topk"}, "selection='topk' (did you mean 'topk_mean'?); expected one of argmax"),
        ("emca", {"norm_axis": "rows"}, "norm_axis='rows' (did you mean 'row'?); expected one of row, queries, none"),
        ("emca", {"residual": "rwa"}, "residual='rwa' (did you mean 'raw'?); expected one of projected, raw"),
        ("emca", {"empty_mask": "first"}, "empty_mask='first' (did you mean 'first_pixel'?); expected one of everywhere, first_pixel"),
        ("emca", {"alpha": "zeros"}, "alpha='zeros' (did you mean 'zero'?); expected one of learned, one, zero"),
        ("emca", {"product": "off"}, "product='off'; expected one of projected, plain"),
        ("emca", {"selection": "pool"}, "selection='pool'"),
        ("emca", {"selection_gradient": "gumbel"}, "selection_gradient='gumbel'; expected one of none, straight_through"),
        ("emca", {"head_split": "feature"}, "head_split='feature' (did you mean 'features'?); expected one of keys, features"),
        ("emca_soft", {"temperature": "fix"}, "temperature='fix' (did you mean 'fixed'?); expected one of learned, per_head, fixed"),
        ("emca_soft", {"temperature_start": 0.0}, "temperature_start=0.0; expected more than 0"),
        ("emca_soft", {"temperature_start": float("nan")}, "temperature_start=nan; expected more than 0"),
        ("emca", {"temperature": "fixed"}, "temperature='fixed' from 1.0 with selection='argmax'"),
        (
            "emca",
            {"selection": "mean", "selection_gradient": "straight_through"},
            "selection_gradient='straight_through' with selection='mean'",
        ),
        (
            "emca",
            {"empty_mask": "first_pixel", "selection_gradient": "straight_through"},
            "selection_gradient='straight_through' with empty_mask='first_pixel'",
        ),
        ("emca", {"selection": "pool_and_prototype", "empty_mask": "first_pixel"}, "empty_mask='first_pixel' with"),
        ("emca", {"selection": "pool_and_prototype", "prototypes": 2}, "prototypes=2 with selection='pool_and_prototype'"),
        ("emca", {"head_split": "features", "folded": False}, "head_split='features' needs normalize_keys=false and no folded=false"),
        ("emca", {"head_split": "features", "normalize_keys": True}, "head_split='features' needs normalize_keys=false"),
        ("emca", {"alpha": "zero", "residual": "raw"}, "alpha='zero' with residual='raw' and selection='argmax': nothing would train W_Q"),
        ("emca", {"query_init": "eye"}, "query_init='eye'; expected one of xavier, identity"),
        ("emca", {"prototypes": 0}, "prototypes=0 with selection='argmax'"),
        ("emca", {"prototypes": 2}, "prototypes=2 with selection='argmax': expected 1, or topk_mean, topk_softmax or random"),
        ("emca", {"prototypes": 2, "selection": "mean"}, "prototypes=2 with selection='mean'"),
        ("emca", {"folded": True, "normalize_keys": True}, "folded=true needs normalize_keys=false"),
        ("emca", {"selection": "softmax", "empty_mask": "first_pixel"}, "empty_mask='first_pixel' with selection='softmax'"),
    ],
)
def test_what_a_study_may_get_wrong_is_named(name: str, switches: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        build_attention(name, width=16, **switches)  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)
