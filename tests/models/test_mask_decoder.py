"""The mask decoder: its mask rule, its two mask sources, what it returns and how it starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emca_bench.errors import UsageError
from emca_bench.models import ATTENTIONS, CrossAttention, Predictions, build_attention
from emca_bench.models.mask_decoder import CrossAttentionLayer, FFNLayer, MaskDecoder, SelfAttentionLayer
from emca_bench.models.position import sine_position

WIDTH, QUERIES, CLASSES, IMAGE = 16, 6, 3, (64, 90)
LEVELS = [(2, 3), (4, 6), (8, 12)]


class Spy(CrossAttention):
    """Moves every query by something of its own and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Any] = {}
        self.move = nn.Parameter(torch.randn(QUERIES, WIDTH))

    def forward(
        self,
        queries: Tensor,
        query_pos: Tensor | None,
        features: Tensor,
        feature_pos: Tensor | None,
        allowed: Tensor | None,
        *,
        shape: tuple[int, int],
    ) -> Tensor:
        self.seen = {"queries": queries, "query_pos": query_pos, "features": features, "feature_pos": feature_pos}
        self.seen |= {"allowed": allowed, "shape": shape}
        return queries + self.move

    def macs(self, *, pixels: int, queries: int) -> int:
        return 0


def linears(module: nn.Module) -> list[nn.Linear]:
    return [child for child in module.modules() if isinstance(child, nn.Linear)]


def make(attention: Callable[[], CrossAttention], layers: int = 6, **changes: Any) -> MaskDecoder:
    numbers: dict[str, Any] = {"width": WIDTH, "classes": CLASSES, "queries": QUERIES, "heads": 4, "feedforward": 32, **changes}
    decoder = MaskDecoder(attention=attention, layers=layers, **numbers).double()
    # masks of either sign everywhere, also in a decoder that nothing has trained
    nn.init.normal_(linears(decoder.mask_embed)[-1].bias)
    return decoder


def make_inputs(batch: int = 2) -> tuple[Tensor, list[Tensor]]:
    stride4 = torch.randn(batch, WIDTH, 16, 24, dtype=torch.float64)
    return stride4, [torch.randn(batch, WIDTH, *level, dtype=torch.float64) for level in LEVELS]


def spies(decoder: MaskDecoder) -> list[Spy]:
    return [module for module in decoder.modules() if isinstance(module, Spy)]


def attend_as_torch(among: SelfAttentionLayer, located: Tensor, content: Tensor) -> Tensor:
    """Torch's own multi-head attention with the layer's parameters."""
    located, content = (tokens.expand(1, -1, -1) if tokens.dim() == 2 else tokens for tokens in (located, content))
    return nn.MultiheadAttention.forward(among.self_attn, located, located, content)[0][0]


@pytest.mark.parametrize("mask_source", ["logits", "features"])
def test_a_pixel_is_blocked_where_the_resized_previous_mask_is_below_one_half(mask_source: str) -> None:
    decoder = make(Spy, mask_source=mask_source)
    # so many that no layer's masks are all open or all closed
    predictions = decoder(*make_inputs(8), image_size=IMAGE, auxiliary=True)
    for index, (spy, earlier) in enumerate(zip(spies(decoder), predictions.auxiliary, strict=True)):
        level = LEVELS[index % 3]
        logits = F.interpolate(earlier.mask_logits, size=level, mode="bilinear", align_corners=False)
        blocked = logits.sigmoid() < 0.5
        assert 0.01 < blocked.double().mean() < 0.99
        assert spy.seen["shape"] == level
        assert torch.equal(spy.seen["allowed"], ~blocked.flatten(2))


@pytest.mark.parametrize("mask_source", ["logits", "features"])
def test_a_pixel_is_the_winners_where_the_rule_says_so(mask_source: str) -> None:
    decoder = make(Spy, mask_source=mask_source, mask_rule="winner")
    predictions = decoder(*make_inputs(8), image_size=IMAGE, auxiliary=True)
    for index, (spy, earlier) in enumerate(zip(spies(decoder), predictions.auxiliary, strict=True)):
        logits = F.interpolate(earlier.mask_logits, size=LEVELS[index % 3], mode="bilinear", align_corners=False).flatten(2)
        assert torch.equal(spy.seen["allowed"], F.one_hot(logits.argmax(1), QUERIES).bool().mT)
        assert not spy.seen["allowed"].requires_grad


@pytest.mark.parametrize("compiled", [False, True])
def test_every_pixel_has_one_winner_in_half_precision_too(compiled: bool) -> None:
    """Ties are frequent there and the first query's; a compiler that rounds logits twice must not find other ones."""
    decoder = make(Spy, layers=1, queries=40, mask_source="features", mask_rule="winner").to(torch.bfloat16)
    # a folded mask projection: the last number of an embedding is added to the product
    embedding, features = torch.randn(2, 40, WIDTH + 1).bfloat16(), torch.randn(2, 300, WIDTH).bfloat16()
    rule = torch.compile(decoder._allowed_from_features) if compiled else decoder._allowed_from_features
    allowed = rule(embedding, features)
    assert torch.equal(allowed.sum(1), torch.ones(2, 300, dtype=torch.int64))
    if not compiled:
        assert torch.equal(allowed.int().argmax(1), decoder._mask_logits(embedding, features).argmax(1))


def test_levels_come_in_turn_with_their_embedding_and_position() -> None:
    decoder = make(Spy, layers=4)
    stride4, pyramid = make_inputs()
    decoder(stride4, pyramid, image_size=IMAGE)
    for index, spy in enumerate(spies(decoder)):
        features = pyramid[index % 3].flatten(2).mT + decoder.level_embed.weight[index % 3]
        torch.testing.assert_close(spy.seen["features"], features)
        position = spy.seen["feature_pos"].expand_as(features)
        torch.testing.assert_close(position, sine_position(LEVELS[index % 3], WIDTH, dtype=torch.float64).expand_as(features))
        assert torch.equal(spy.seen["query_pos"][1], decoder.query_embed.weight)


def test_masks_carry_no_gradient() -> None:
    decoder = make(Spy)
    decoder(*make_inputs(), image_size=IMAGE)
    assert not any(spy.seen["allowed"].requires_grad for spy in spies(decoder))


@pytest.mark.parametrize("auxiliary", [True, False])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_both_mask_sources_predict_the_same(name: str, auxiliary: bool) -> None:
    published = make(lambda: build_attention(name, width=WIDTH)).eval()
    rewritten = make(lambda: build_attention(name, width=WIDTH), mask_source="features").eval()
    rewritten.load_state_dict(published.state_dict())
    inputs = make_inputs()
    one, other = (decoder(*inputs, image_size=IMAGE, auxiliary=auxiliary) for decoder in (published, rewritten))
    assert len(one.auxiliary) == len(other.auxiliary) == (6 if auxiliary else 0)
    for first, second in zip((one, *one.auxiliary), (other, *other.auxiliary), strict=True):
        for field in ("class_logits", "mask_logits"):
            wanted = getattr(first, field)
            assert (getattr(second, field) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("layers", [1, 3, 5])
@pytest.mark.parametrize("mask_source", ["logits", "features"])
def test_training_returns_a_prediction_before_each_layer_and_evaluation_none(mask_source: str, layers: int) -> None:
    decoder = make(Spy, layers=layers, mask_source=mask_source)
    inputs = make_inputs()
    trained: Predictions = decoder.train()(*inputs, image_size=IMAGE)
    assert len(trained.auxiliary) == layers
    for prediction in (trained, *trained.auxiliary):
        assert prediction.class_logits.shape == (2, QUERIES, CLASSES + 1)
        assert prediction.mask_logits.shape == (2, QUERIES, 16, 24)
        assert prediction.image_size == IMAGE
    evaluated: Predictions = decoder.eval()(*inputs, image_size=IMAGE)
    assert evaluated.auxiliary == ()
    torch.testing.assert_close(evaluated.mask_logits, trained.mask_logits)


def test_the_first_prediction_is_of_the_learned_queries() -> None:
    decoder = make(Spy)
    stride4, pyramid = make_inputs()
    first = decoder(stride4, pyramid, image_size=IMAGE).auxiliary[0]
    normed = F.layer_norm(decoder.query_feat.weight, (WIDTH,), decoder.decoder_norm.weight, decoder.decoder_norm.bias)
    torch.testing.assert_close(first.class_logits[0], normed @ decoder.class_embed.weight.T + decoder.class_embed.bias)
    hidden = normed
    for index, layer in enumerate(linears(decoder.mask_embed)):
        hidden = hidden @ layer.weight.T + layer.bias
        hidden = hidden.clamp(min=0) if index < 2 else hidden
    torch.testing.assert_close(first.mask_logits[1], (hidden @ stride4[1].flatten(1)).unflatten(1, (16, 24)))


def test_a_layer_is_cross_attention_then_self_attention_then_feed_forward() -> None:
    decoder = make(Spy, layers=1)
    inputs = make_inputs(1)
    last = decoder(*inputs, image_size=IMAGE)
    (cross,) = [module for module in decoder.modules() if isinstance(module, CrossAttentionLayer)]
    (among,) = [module for module in decoder.modules() if isinstance(module, SelfAttentionLayer)]
    (ffn,) = [module for module in decoder.modules() if isinstance(module, FFNLayer)]
    (spy,) = spies(decoder)
    position = decoder.query_embed.weight
    queries = decoder.query_feat.weight
    queries = cross.norm(queries + spy.move)
    located = queries + position
    queries = among.norm(queries + attend_as_torch(among, located, queries))
    queries = ffn.norm(queries + ffn.linear2(ffn.linear1(queries).clamp(min=0)))
    torch.testing.assert_close(last.class_logits[0], decoder.class_embed(decoder.decoder_norm(queries)))


def test_with_pre_norm_every_sub_layer_adds_to_the_queries_as_they_came() -> None:
    decoder = make(Spy, layers=1, pre_norm=True)
    last = decoder(*make_inputs(1), image_size=IMAGE)
    (cross,) = [module for module in decoder.modules() if isinstance(module, CrossAttentionLayer)]
    (among,) = [module for module in decoder.modules() if isinstance(module, SelfAttentionLayer)]
    (ffn,) = [module for module in decoder.modules() if isinstance(module, FFNLayer)]
    (spy,) = spies(decoder)
    queries = decoder.query_feat.weight
    torch.testing.assert_close(spy.seen["queries"][0], cross.norm(queries))
    queries = queries + spy.move
    content = among.norm(queries)
    located = content + decoder.query_embed.weight
    queries = queries + attend_as_torch(among, located, content)
    queries = queries + ffn.linear2(ffn.linear1(ffn.norm(queries)).clamp(min=0))
    torch.testing.assert_close(last.class_logits[0], decoder.class_embed(decoder.decoder_norm(queries)))


def test_with_pre_norm_an_attention_that_normalises_its_queries_gets_them_as_they_came() -> None:
    class Normalising(Spy):
        normalises_queries = True

    decoder = make(Normalising, layers=1, pre_norm=True)
    decoder(*make_inputs(1), image_size=IMAGE)
    assert torch.equal(spies(decoder)[0].seen["queries"][0], decoder.query_feat.weight)
    assert not any("cross_attention" in name and "norm" in name for name in decoder.state_dict())


@pytest.mark.parametrize("name", ATTENTIONS)
def test_an_attention_knows_whether_it_normalises_its_queries(name: str) -> None:
    """Scaled queries make no difference to one that does, nor to one that compares nothing."""
    attention = build_attention(name, width=WIDTH).double().eval()
    queries, features = torch.randn(1, QUERIES, WIDTH, dtype=torch.float64), torch.randn(1, 6, WIDTH, dtype=torch.float64)
    once, scaled = (attention(factor * queries, None, features, None, None, shape=(2, 3)) - factor * queries for factor in (1, 3))
    assert bool((once - scaled).abs().max() < 1e-3) is (attention.normalises_queries or name in ("none", "mask_mean"))


def test_levels_of_another_width_are_projected_first() -> None:
    decoder = make(Spy, layers=3, pyramid_channels=5)
    stride4, _ = make_inputs()
    pyramid = [torch.randn(2, 5, *level, dtype=torch.float64) for level in LEVELS]
    decoder(stride4, pyramid, image_size=IMAGE)
    for index, spy in enumerate(spies(decoder)):
        weight, bias = (decoder.state_dict()[f"input_proj.{index}.{part}"] for part in ("weight", "bias"))
        projected = torch.einsum("oc,bcp->bpo", weight[..., 0, 0], pyramid[index].flatten(2)) + bias
        torch.testing.assert_close(spy.seen["features"], projected + decoder.level_embed.weight[index])


def test_levels_of_its_own_width_are_not() -> None:
    assert not any("input_proj" in name for name in make(Spy, pyramid_channels=WIDTH).state_dict())


def test_an_unknown_source_or_rule_of_masks_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"mask_source='feature' \(did you mean 'features'\?\); expected one of logits, features"):
        make(Spy, mask_source="feature")
    with pytest.raises(UsageError, match=r"mask_rule='winers' \(did you mean 'winner'\?\); expected one of threshold, winner"):
        make(Spy, mask_rule="winers")
