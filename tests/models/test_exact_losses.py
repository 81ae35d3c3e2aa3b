"""Losses from mask embeddings and features are those of the published formulation, which makes every mask: values and all gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from emca_bench.measure.memory import peak_memory_bytes
from emca_bench.models import Predictions, build_model
from emca_bench.models.criterion import Criterion
from emca_bench.models.mask_logits import MaskProduct, logits_of, values_at

CLASSES, POINTS = 12, 60


@dataclass
class Truth:
    labels: Tensor
    masks: Tensor


def sample(maps: Tensor, points: Tensor) -> Tensor:
    return F.grid_sample(maps, 2 * points[:, :, None] - 1, align_corners=False)[..., 0]


def published_losses(predictions: Predictions, truths: list[Truth], points: int) -> dict[str, Tensor]:
    """Prediction by prediction, image by image, with all masks at stride 4 and true masks as numbers."""
    losses = {}
    for name, each in (("", predictions), *((f"_{index}", each) for index, each in enumerate(predictions.auxiliary))):
        masks = each.mask_logits
        pairs = []
        for classes, logits, truth in zip(each.class_logits.detach(), masks.detach(), truths, strict=True):
            at = torch.rand(1, points, 2, dtype=logits.dtype)
            found, true = sample(logits[None], at)[0], sample(truth.masks[None].to(logits), at)[0]
            entropy = (F.softplus(-found) @ true.T + F.softplus(found) @ (1 - true).T) / points
            overlap = 2 * found.sigmoid() @ true.T
            dice = 1 - (overlap + 1) / (found.sigmoid().sum(1)[:, None] + true.sum(1) + 1)
            cost = 5 * entropy - 2 * classes.softmax(-1)[:, truth.labels] + 5 * dice
            pairs.append([torch.as_tensor(side) for side in linear_sum_assignment(cost.numpy())])
        wanted = torch.full(each.class_logits.shape[:2], CLASSES)
        for row, truth, (queries, segments) in zip(wanted, truths, pairs, strict=True):
            row[queries] = truth.labels[segments]
        weight = torch.tensor([1.0] * CLASSES + [0.1]).to(masks)
        losses[f"loss_ce{name}"] = F.cross_entropy(each.class_logits.mT, wanted, weight)
        logits = torch.cat([rows[queries] for rows, (queries, _) in zip(masks, pairs, strict=True)])[:, None]
        true = torch.cat([truth.masks[segments] for truth, (_, segments) in zip(truths, pairs, strict=True)])[:, None].to(logits)
        with torch.no_grad():
            candidates = torch.rand(len(logits), 3 * points, 2, dtype=logits.dtype)
            uncertain = sample(logits, candidates)[:, 0].abs().topk(int(0.75 * points), dim=1, largest=False).indices
            kept = candidates.gather(1, uncertain[..., None].expand(-1, -1, 2))
            at = torch.cat([kept, torch.rand(len(logits), points - int(0.75 * points), 2, dtype=logits.dtype)], 1)
            goal = sample(true, at)[:, 0]
        seen = sample(logits, at)[:, 0]
        segments = max(sum(len(truth.labels) for truth in truths), 1)
        losses[f"loss_mask{name}"] = F.binary_cross_entropy_with_logits(seen, goal, reduction="none").mean(1).sum() / segments
        overlap = 2 * (seen.sigmoid() * goal).sum(1)
        losses[f"loss_dice{name}"] = (1 - (overlap + 1) / (seen.sigmoid().sum(1) + goal.sum(1) + 1)).sum() / segments
    return losses


def make_leaves(batch: int, queries: int, width: int, size: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """Features, and classes and embeddings of three predictions."""
    shapes = [(batch, width, *size), *((batch, queries, CLASSES + 1), (batch, queries, width)) * 3]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def predict(leaves: list[Tensor], *, made: bool) -> Predictions:
    features, *rest = leaves
    found = [
        Predictions(classes, MaskProduct(embeddings, features), (4 * features.shape[2], 4 * features.shape[3]))
        for classes, embeddings in zip(rest[::2], rest[1::2], strict=True)
    ]
    found = [replace(each, masks=each.mask_logits) if made else each for each in found]
    return replace(found[0], auxiliary=tuple(found[1:]))


def make_truths(counts: list[int], size: tuple[int, int]) -> list[Truth]:
    """A mask is empty, one nearly full, some pixels are nobody's; classes differ, so that no two matches cost the same."""
    truths = []
    for count in counts:
        masks = F.interpolate(torch.randn(1, count, 5, 7), size=[4 * side for side in size], mode="bilinear")[0] > 0.2 if count else None
        masks = torch.zeros(0, 4 * size[0], 4 * size[1], dtype=torch.bool) if masks is None else masks
        masks[:1] = False
        masks[1:2] = True
        masks[:, :3] = False
        truths.append(Truth(torch.randperm(CLASSES)[:count], masks))
    return truths


@pytest.mark.parametrize("counts", [[3], [0], [2, 4], [0, 3, 1], [9, 12]], ids=str)
@pytest.mark.parametrize(
    ("size", "width", "points"),
    [((8, 8), 4, POINTS), ((9, 13), 6, POINTS), ((9, 13), 6, 7), ((1, 5), 3, 11)],
    ids=["even", "odd", "fewer points than pixels", "one row"],
)
@pytest.mark.parametrize("made", [False, True], ids=["product", "logits"])
def test_losses_and_gradients_are_the_published_ones(
    counts: list[int], size: tuple[int, int], width: int, points: int, made: bool, seed: int
) -> None:
    leaves, truths = make_leaves(len(counts), 7, width, size, torch.float64), make_truths(counts, size)
    loss = Criterion(classes=CLASSES, points=points)
    torch.manual_seed(seed)
    wanted = published_losses(predict(leaves, made=True), truths, points)
    expected = torch.autograd.grad(loss.total(wanted), leaves)
    torch.manual_seed(seed)
    found = loss(predict(leaves, made=made), truths)
    gradients = torch.autograd.grad(loss.total(found), leaves)
    assert list(found) == list(wanted)
    for name in wanted:
        # the weight 0.1 of "no object" is a float32 in both
        assert abs(found[name] - wanted[name]).item() <= 1e-9 * max(1, abs(wanted[name].item())), name
    for gradient, other in zip(gradients, expected, strict=True):
        assert (gradient - other).norm() <= 1e-9 * (1 + other.norm())
    if any(counts):
        assert gradients[0].norm() > 0


@pytest.mark.parametrize("attention", ["masked", "emca"])
def test_a_training_step_has_the_published_gradients_in_every_parameter(attention: str, seed: int) -> None:
    """By norm in float64 and float32; images of an odd size."""
    model = build_model("mask2former_tiny", num_classes=CLASSES, attention=attention, mask_source="features").train()
    images, truths = 255 * torch.rand(2, 3, 75, 101), make_truths([3, 2], (24, 32))
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        model.to(dtype)
        loss = Criterion(classes=CLASSES, points=POINTS)
        predictions = model(images.to(dtype))
        assert all(isinstance(each.masks, MaskProduct) for each in (predictions, *predictions.auxiliary))
        parameters = list(model.parameters())
        torch.manual_seed(seed)
        wanted = torch.autograd.grad(loss.total(published_losses(predictions, truths, POINTS)), parameters, retain_graph=True)
        torch.manual_seed(seed)
        found = torch.autograd.grad(loss.total(loss(predictions, truths)), parameters)
        scale = torch.stack([gradient.norm() for gradient in wanted]).norm()
        for (name, _), gradient, other in zip(model.named_parameters(), found, wanted, strict=True):
            assert (gradient - other).norm() <= tolerance * (other.norm() + 1e-3 * scale), (name, dtype)


@pytest.mark.parametrize("points", [3, 1000])
def test_values_at_points_do_not_depend_on_how_they_are_made(points: int) -> None:
    """Few points: sampled features; many: all logits."""
    product = MaskProduct(torch.randn(2, 7, 4, dtype=torch.float64), torch.randn(2, 4, 6, 9, dtype=torch.float64))
    at = torch.rand(1, points, 2, dtype=torch.float64)
    for image in range(2):
        torch.testing.assert_close(values_at(product, image, at), values_at(product.dense(), image, at), rtol=0, atol=1e-12)


def test_predictions_may_have_features_of_their_own() -> None:
    products = [MaskProduct(torch.randn(1, 7, 4), torch.randn(1, 4, 6, 9)) for _ in range(2)]
    chosen = [torch.tensor([5, 0]), torch.tensor([1])]
    expected = torch.cat([each.dense()[0][rows] for each, rows in zip(products, chosen, strict=True)])
    torch.testing.assert_close(logits_of(products, 0, chosen), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_halves_are_compared_in_float32(dtype: torch.dtype, seed: int) -> None:
    leaves, truths = make_leaves(1, 7, 4, (8, 8), dtype), make_truths([3], (8, 8))
    loss = Criterion(classes=CLASSES, points=POINTS)
    torch.manual_seed(seed)
    found = loss(predict(leaves, made=False), truths)
    torch.manual_seed(seed)
    wanted = loss(predict(leaves, made=True), truths)
    for name, value in wanted.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], value, rtol=2e-2, atol=2e-2)


def test_autocast_makes_products_of_its_dtype() -> None:
    model = build_model("mask2former_tiny", num_classes=CLASSES, mask_source="features").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predictions = model(255 * torch.rand(1, 3, 64, 64))
    masks = predictions.masks
    assert isinstance(masks, MaskProduct)
    assert masks.embeddings.dtype == masks.features.dtype == masks.dtype == torch.bfloat16
    assert masks.shape == predictions.mask_logits.shape
    assert all(each.masks.features is masks.features for each in predictions.auxiliary)
    loss = Criterion(classes=CLASSES, points=POINTS)
    loss.total(loss(predictions, make_truths([2], (16, 16)))).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("mask_source", ["features", "logits"])
def test_evaluation_has_the_logits_themselves(mask_source: str) -> None:
    model = build_model("mask2former_tiny", num_classes=CLASSES, mask_source=mask_source).eval()
    with torch.no_grad():
        assert isinstance(model(255 * torch.rand(1, 3, 64, 64)).masks, Tensor)


def test_losses_take_a_part_of_the_memory_of_the_published_ones() -> None:
    """Queries, points and width of Mask2Former-R50, with four of its ten predictions; counted allocations, features not among them."""
    leaves, truths = make_leaves(1, 100, 256, (64, 64), torch.float32)[:7], make_truths([8], (64, 64))
    points = 2000

    def step(published: bool) -> list[Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            loss = Criterion(classes=CLASSES, points=points)
            predictions = predict(leaves, made=published)
            losses = published_losses(predictions, truths, points) if published else loss(predictions, truths)
            return list(torch.autograd.grad(loss.total(losses), leaves))

    own = sum(leaf.nbytes for leaf in leaves)
    published, found = (peak_memory_bytes(lambda published=published: step(published), device="cpu") - own for published in (True, False))
    all_masks = 3 * 100 * 64 * 64 * 4
    assert published > all_masks
    assert found < 0.5 * published
