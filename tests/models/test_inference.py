from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emca_bench import inference
from emca_bench.inference import instances, panoptic, semantic, semantic_scores
from emca_bench.measure.memory import peak_memory_bytes
from emca_bench.models import Predictions

THINGS = (True, True, False, False)
SIZE = (32, 48)


@pytest.fixture(autouse=True, params=[2**25, 7_000, 1], ids=["whole", "parts", "least parts"])
def _chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test holds for results made in one part, in some parts, and a mask or a strip at a time."""
    monkeypatch.setattr(inference, "CHUNK", request.param)


class LargestTensor(TorchDispatchMode):
    """Notes the greatest number of numbers of any tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
        self.numel = max([self.numel, *found])
        return result


def random_predictions(*, queries: int, confident: float, dtype: torch.dtype = torch.float64) -> Predictions:
    class_logits = confident * torch.randn(2, queries, len(THINGS) + 1, dtype=dtype)
    coarse = 8 * torch.randn(2, queries, 2, 3, dtype=dtype)
    mask_logits = torch.nn.functional.interpolate(coarse, size=(8, 12), mode="bilinear")
    return Predictions(class_logits, mask_logits, SIZE)


def published_panoptic(scores, categories, masks, overlap, size=SIZE):
    """The published loop over queries, one at a time."""
    ids, found, memory = torch.zeros(size, dtype=torch.int32), [], {}
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
        # stable: empty masks all score zero
        expected.sort(key=lambda entry: -entry[0])
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


RESULTS = {
    "semantic": semantic,
    "panoptic": lambda predictions, size: panoptic(predictions, size, things=THINGS, object_threshold=0.3),
    "instances": lambda predictions, size: instances(predictions, size, things=THINGS),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(29, 45), (64, 96), (17, 23)])
def test_parts_give_the_same_result_as_one_piece(size: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    predictions = random_predictions(queries=30, confident=6.0, dtype=dtype)
    predictions = Predictions(predictions.class_logits, predictions.mask_logits, (29, 45))
    found = {name: result(predictions, size) for name, result in RESULTS.items()}
    scores = semantic_scores(predictions, size)
    monkeypatch.setattr(inference, "CHUNK", 2**40)
    # sums over queries and over pixels may be taken in another order for another number of pixels or masks
    close = {"rtol": 32 * torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps}
    assert torch.allclose(scores, semantic_scores(predictions, size), **close)
    assert (found["semantic"] == semantic(predictions, size)).float().mean() > 0.999
    for mine, whole in zip(found["panoptic"], RESULTS["panoptic"](predictions, size), strict=True):
        assert mine.segments == whole.segments
        assert torch.equal(mine.ids, whole.ids)
    for mine, whole in zip(found["instances"], RESULTS["instances"](predictions, size), strict=True):
        assert torch.allclose(mine.scores, whole.scores, **close)
        assert torch.equal(mine.masks, whole.masks)


def test_of_equal_masks_in_different_parts_the_first_owns_the_pixels():
    class_logits = torch.full((1, 4, 3), -9.0)
    class_logits[0, 0, 0] = class_logits[0, 1:, 1] = 9.0
    predictions = Predictions(class_logits, torch.full((1, 4, 2, 3), 5.0), (8, 12))
    [result] = panoptic(predictions, (8, 12), things=(True, True))
    assert [segment.category for segment in result.segments] == [0]
    assert (result.ids == 1).all()


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("size", [(256, 48), (300, 60)])
def test_no_tensor_at_full_resolution_holds_all_queries(name: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    queries, pixels = 60, size[0] * size[1]
    class_logits = 6 * torch.randn(1, queries, len(THINGS) + 1)
    predictions = Predictions(class_logits, 5 * torch.randn(1, queries, 64, 12), (256, 48))
    monkeypatch.setattr(inference, "CHUNK", 12 * pixels)
    with LargestTensor() as largest:
        RESULTS[name](predictions, size)
    # a strip has rows of context beside its own
    assert largest.numel <= 12 * pixels + 8 * queries * 60
    monkeypatch.setattr(inference, "CHUNK", 2**40)
    with LargestTensor() as whole:
        RESULTS[name](predictions, size)
    assert whole.numel > 2 * largest.numel


@pytest.mark.parametrize("size", [(29, 45), (41, 30), (17, 91)])
def test_results_at_another_size_are_those_of_masks_resized_twice(size: tuple[int, int]):
    predictions = random_predictions(queries=12, confident=6.0)
    predictions = Predictions(predictions.class_logits, predictions.mask_logits, (29, 45))
    full = torch.nn.functional.interpolate(predictions.mask_logits, size=SIZE, mode="bilinear")[..., :29, :45]
    full = torch.nn.functional.interpolate(full, size=size, mode="bilinear")
    for found, class_logits, logits in zip(RESULTS["panoptic"](predictions, size), predictions.class_logits, full, strict=True):
        scores, categories = class_logits.softmax(-1).max(-1)
        kept = (categories < len(THINGS)) & (scores > 0.3)
        ids, segments = published_panoptic(scores[kept], categories[kept], logits[kept].sigmoid(), 0.8, size)
        assert torch.equal(found.ids, ids)
        assert [segment.category for segment in found.segments] == segments
    for found, logits in zip(RESULTS["instances"](predictions, size), full, strict=True):
        assert len(found.masks) == 12 * sum(THINGS)
        wanted = sorted(int((logits[query] > 0).sum()) for query in range(12) for thing in THINGS if thing)
        assert sorted(found.masks.flatten(1).sum(1).tolist()) == wanted
    summed = torch.einsum("bqk,bqhw->bkhw", predictions.class_logits.softmax(-1)[..., :-1], full.sigmoid())
    assert torch.allclose(semantic_scores(predictions, size, resize_masks=True), summed)


@pytest.mark.parametrize("name", ["panoptic", "instances"])
def test_nothing_is_kept_of_no_objects(name: str):
    class_logits = torch.full((2, 5, len(THINGS) + 1), -20.0)
    class_logits[..., 2] = 20
    class_logits[..., -1] = 60 if name == "panoptic" else 0
    for found in RESULTS[name](Predictions(class_logits, torch.randn(2, 5, 8, 12), SIZE), SIZE):
        if name == "panoptic":
            assert found.ids.shape == SIZE
            assert found.ids.dtype == torch.int32
            assert not found.ids.any()
            assert found.segments == ()
        else:
            # the best pairs are things of score zero
            assert all(score < 1e-6 for score in found.scores.tolist())


class Looks(TorchFunctionMode):
    """Counts what takes values of tensors to the host, or would wait for a device."""

    NAMES = ("tolist", "item", "cpu", "numpy", "nonzero", "bincount", "masked_select", "unique", "__bool__", "__int__", "__float__")
    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.NAMES:
            self.count += 1
        if getattr(func, "__name__", "") == "__getitem__":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.count += any(isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in index)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [SIZE, (17, 23)])
def test_values_go_to_the_host_once_or_twice_whatever_the_number_of_images_and_queries(size: tuple[int, int]):
    predictions = random_predictions(queries=30, confident=6.0)
    with Looks() as looks:
        assert any(found.segments for found in panoptic(predictions, size, things=THINGS, object_threshold=0.3, overlap_threshold=0.0))
    assert looks.count == 2
    with Looks() as looks:
        instances(predictions, size, things=THINGS)
    assert looks.count == 1


@pytest.mark.parametrize("size", [(512, 512), (300, 700)])
def test_peak_memory_is_that_of_the_result_and_a_strip(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    """Counted allocations; all masks at full size would be 100 numbers a pixel."""
    monkeypatch.setattr(inference, "CHUNK", 2**20)
    class_logits = 9 * torch.randn(1, 100, len(THINGS) + 1)
    predictions = Predictions(class_logits, torch.randn(1, 100, 128, 128), (512, 512))
    pixels, strips = size[0] * size[1], 8 * 4 * 2**20
    peak = peak_memory_bytes(lambda: RESULTS["panoptic"](predictions, size), device="cpu")
    # ids, owners, and the logits of the queries that take part
    assert peak < 16 * pixels + predictions.mask_logits.nbytes + strips < 4 * 100 * pixels
    [found] = RESULTS["instances"](predictions, size)
    peak = peak_memory_bytes(lambda: RESULTS["instances"](predictions, size), device="cpu")
    assert peak < found.masks.nbytes + predictions.mask_logits.nbytes + strips
