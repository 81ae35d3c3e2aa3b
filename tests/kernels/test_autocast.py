from __future__ import annotations

import pytest
import torch
from emca_kernels import attend_prototypes, pool_prototypes, select_prototypes

from emca_bench.models import build_model
from emca_bench.models.attention import ATTENTIONS, build_attention


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


def test_operators_take_mixed_dtypes_under_autocast_alone():
    features, queries = rows(2, 7, 4), rows(2, 3, 4, dtype=torch.bfloat16)
    tail = (rows(4, 4), rows(4), rows(4), rows(4, 4), rows(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        indices, scores = select_prototypes(features, queries)
        assert scores.dtype == torch.bfloat16
        assert torch.equal(indices, select_prototypes(features.bfloat16(), queries)[0])
        assert pool_prototypes(features, queries).dtype == torch.bfloat16
        assert attend_prototypes(rows(2, 3, 4), queries, *tail).dtype == torch.bfloat16
    for call in (select_prototypes, pool_prototypes):
        with pytest.raises(TypeError, match="expected the same dtype"):
            call(features, queries)
    with pytest.raises(TypeError, match="expected the same dtype"):
        attend_prototypes(rows(2, 3, 4), queries, *tail)


def test_float64_stays_float64_under_autocast():
    features, queries = rows(2, 7, 4, dtype=torch.float64), rows(2, 3, 4, dtype=torch.float64)
    outside = select_prototypes(features, queries)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = select_prototypes(features, queries)
    assert inside[1].dtype == torch.float64
    assert torch.equal(inside[0], outside[0])


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("name", [name for name in ATTENTIONS if name != "none"])
def test_every_attention_follows_autocast(name: str, folded: bool):
    switches = {"folded": folded} if name in ("emca", "emca_soft", "mask_pooling") else {}
    attention = build_attention(name, width=32, **switches)
    # one pixel each: in bfloat16 a close pair of pixels may swap
    queries, features = rows(2, 5, 32), rows(2, 20, 32)
    allowed = torch.nn.functional.one_hot(torch.randint(20, (2, 5)), 20).bool()
    exact = attention(queries, rows(2, 5, 32) * 0, features, None, allowed, shape=(4, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attention(queries, rows(2, 5, 32) * 0, features, None, allowed, shape=(4, 5))
    assert found.shape == exact.shape
    torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.1)


def test_pixel_decoder_stays_in_float32():
    model = build_model("mask2former_tiny", num_classes=3)
    seen = []
    model.sem_seg_head.pixel_decoder.register_forward_hook(lambda *call: seen.append(call[2].mask_features.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(255 * torch.rand(1, 3, 64, 64))
    assert seen == [torch.float32]
