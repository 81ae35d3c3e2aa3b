from __future__ import annotations

import pytest
import torch

from emca_bench.inference import instances, panoptic, semantic, semantic_scores
from emca_bench.models import Predictions

THINGS = (True, True, False, False)
SIZE = (32, 48)


def random_predictions(*, queries: int, confident: float, dtype: torch.dtype = torch.float64) -> Predictions:
    class_logits = confident * torch.randn(2, queries, len(THINGS) + 1, dtype=dtype)
    coarse = 8 * torch.randn(2, queries, 2, 3, dtype=dtype)
    mask_logits = torch.nn.functional.interpolate(coarse, size=(8, 12), mode="bilinear")
    return Predictions(class_logits, mask_logits, SIZE)


def published_panoptic(scores, categories, masks, overlap):
    """The published loop over queries, one at a time."""
    ids, found, memory = torch.zeros(SIZE, dtype=torch.int32), [], {}
    if not len(scores):
        return ids, found
    owner = (scores[:, None, None] * masks).argmax(0)
    for index in range(len(scores)):
        category = int(categories[index])
        mine = owner == index
        visible = mine & (masks[index] >= 0.5)
        original = int((masks[index] >= 0.5).sum())
        if not (int(mine.sum()) and original and int(visible.sum())) or int(mine.sum()) / original < overlap:
            continue
        if not THINGS[category] and category in memory:
            ids[visible] = memory[category]
            continue
        found.append(category)
        memory[category] = len(found)
        ids[visible] = len(found)
    return ids, found


@pytest.mark.parametrize("queries", [1, 5, 30])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.8])
def test_panoptic_equals_the_published_loop(queries: int, overlap: float):
    predictions = random_predictions(queries=queries, confident=6.0)
    results = panoptic(predictions, SIZE, things=THINGS, object_threshold=0.6, overlap_threshold=overlap)
    full = torch.nn.functional.interpolate(predictions.mask_logits, size=SIZE, mode="bilinear").sigmoid()
    for result, class_logits, masks in zip(results, predictions.class_logits, full, strict=True):
        scores, categories = class_logits.softmax(-1).max(-1)
        kept = (categories < len(THINGS)) & (scores > 0.6)
        ids, found = published_panoptic(scores[kept], categories[kept], masks[kept], overlap)
        assert torch.equal(result.ids, ids)
        assert [segment.category for segment in result.segments] == found
        assert [segment.id for segment in result.segments] == list(range(1, len(found) + 1))
        assert all(segment.thing == THINGS[segment.category] for segment in result.segments)
        stuff = [segment.category for segment in result.segments if not segment.thing]
        assert len(stuff) == len(set(stuff))


def test_nothing_above_the_threshold_is_an_empty_map():
    result = panoptic(random_predictions(queries=7, confident=0.01), SIZE, things=THINGS)
    assert all(not entry.segments and not entry.ids.any() for entry in result)


@pytest.mark.parametrize("most", [1, 6, 1000])
def test_instances_are_scored_pairs_of_query_and_thing_class(most: int):
    predictions = random_predictions(queries=5, confident=2.0)
    full = torch.nn.functional.interpolate(predictions.mask_logits, size=SIZE, mode="bilinear")
    for result, class_logits, logits in zip(
        instances(predictions, SIZE, things=THINGS, most=most), predictions.class_logits, full, strict=True
    ):
        pairs = sorted(
            ((float(p), q, k) for q, row in enumerate(class_logits.softmax(-1)[:, :-1]) for k, p in enumerate(row)), reverse=True
        )[:most]
        expected = []
        for probability, query, category in pairs:
            if THINGS[category]:
                mask = logits[query] > 0
                inside = float(logits[query].sigmoid()[mask].mean()) if mask.any() else 0.0
                expected.append((probability * inside, category, int(mask.sum())))
        expected.sort(reverse=True)
        assert result.scores.tolist() == pytest.approx([score for score, _, _ in expected])
        assert result.categories.tolist() == [category for _, category, _ in expected]
        assert result.masks.flatten(1).sum(1).tolist() == [area for _, _, area in expected]


def test_semantic_is_the_sum_over_queries():
    predictions = random_predictions(queries=4, confident=1.0)
    full = torch.nn.functional.interpolate(predictions.mask_logits, size=SIZE, mode="bilinear").sigmoid()
    expected = sum(predictions.class_logits.softmax(-1)[:, query, :-1, None, None] * full[:, query, None] for query in range(4))
    assert torch.allclose(semantic_scores(predictions, SIZE), expected)
    assert torch.equal(semantic(predictions, SIZE), expected.argmax(1))


@pytest.mark.parametrize("size", [(32, 48), (64, 96), (17, 23)])
def test_all_results_have_the_wanted_size_and_padding_is_cropped(size: tuple[int, int]):
    predictions = random_predictions(queries=6, confident=6.0)
    cropped = Predictions(predictions.class_logits, predictions.mask_logits, (20, 40))
    assert semantic(cropped, size).shape == (2, *size)
    assert all(result.ids.shape == size for result in panoptic(cropped, size, things=THINGS))
    assert all(result.masks.shape[1:] == size for result in instances(cropped, size, things=THINGS))
    inside = semantic(cropped, (20, 40))
    assert torch.equal(inside, semantic(predictions, SIZE)[:, :20, :40])
