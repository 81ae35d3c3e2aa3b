"""Masks at sampled points."""

from __future__ import annotations

import pytest
import torch

from emca_bench.models.point_sampling import PackedMasks, sample_points, uncertain_points


def test_pixel_centres_read_pixel_values() -> None:
    maps = torch.randn(2, 3, 5, 7)
    y, x = torch.meshgrid((torch.arange(5) + 0.5) / 5, (torch.arange(7) + 0.5) / 7, indexing="ij")
    points = torch.stack([x, y], -1).flatten(0, 1).expand(2, -1, -1)
    torch.testing.assert_close(sample_points(maps, points), maps.flatten(2))


def test_between_four_centres_lies_their_mean() -> None:
    maps = torch.randn(1, 1, 2, 2)
    torch.testing.assert_close(sample_points(maps, torch.full((1, 1, 2), 0.5)).flatten(), maps.mean().view(1))


def test_the_first_coordinate_runs_along_the_columns() -> None:
    maps = torch.arange(5.0).expand(1, 1, 3, 5)
    points = torch.tensor([[[0.5 / 5, 0.5], [4.5 / 5, 0.5]]])
    torch.testing.assert_close(sample_points(maps, points).flatten(), torch.tensor([0.0, 4.0]))


@pytest.mark.parametrize("shapes", [(0, 1), (1, 0)])
def test_no_maps_give_no_values(shapes: tuple[int, int]) -> None:
    maps, channels = shapes
    assert sample_points(torch.zeros(maps, channels, 4, 4), torch.rand(maps, 9, 2)).shape == (maps, channels, 9)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 3), (32, 17)])
@pytest.mark.parametrize("shared", [False, True])
def test_masks_are_sampled_as_maps_are(shape: tuple[int, int], shared: bool, seed: int) -> None:
    """Corners of the map and pixel centres included; what lies beyond the border is zero for both."""
    torch.manual_seed(seed)
    masks = torch.rand(4, *shape) < 0.5
    centres = torch.stack(
        [(torch.arange(shape[1]) + 0.5).repeat(shape[0]) / shape[1], (torch.arange(shape[0]) + 0.5).repeat_interleave(shape[1]) / shape[0]],
        -1,
    )
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    points = torch.stack([torch.cat([torch.rand(40, 2), centres, corners]) for _ in range(1 if shared else 4)]).double()
    expected = sample_points(masks[:, None].double(), points.expand(4, -1, -1))[:, 0]
    torch.testing.assert_close(PackedMasks(masks).at(points), expected, rtol=0, atol=1e-12)


def test_no_masks_give_no_samples() -> None:
    assert PackedMasks(torch.zeros(0, 4, 4, dtype=torch.bool)).at(torch.rand(0, 9, 2)).shape == (0, 9)
    assert PackedMasks(torch.zeros(0, 4, 4, dtype=torch.bool)).at(torch.rand(1, 9, 2)).shape == (0, 9)


def test_the_important_share_lies_where_masks_are_least_certain() -> None:
    """A third of the candidates see exactly zero, more than the share that is kept by importance."""
    logits = torch.full((2, 1, 64, 64), 8.0)
    logits[:, :, :, 20:44] = 0
    points, importance = 1000, 0.75
    at = uncertain_points(logits, points=points, oversampling=3.0, importance=importance)
    assert at.shape == (2, points, 2)
    assert ((at >= 0) & (at <= 1)).all()
    seen = sample_points(logits, at)[:, 0].abs()
    assert not seen[:, :750].any()
    assert 0.4 < (seen[:, 750:] > 0).double().mean() < 0.85


@pytest.mark.parametrize("importance", [0.0, 1.0])
def test_importance_may_be_nothing_or_all(importance: float) -> None:
    logits = torch.randn(3, 1, 8, 8)
    assert uncertain_points(logits, points=10, oversampling=3.0, importance=importance).shape == (3, 10, 2)


def test_a_mask_s_sign_does_not_matter_to_its_uncertainty(seed: int) -> None:
    logits = torch.randn(2, 1, 8, 8)
    points = []
    for sign in (1, -1):
        torch.manual_seed(seed)
        points.append(uncertain_points(sign * logits, points=12, oversampling=3.0, importance=0.75))
    assert torch.equal(*points)


def test_masks_have_points_of_their_own() -> None:
    at = uncertain_points(torch.zeros(2, 1, 8, 8), points=5, oversampling=3.0, importance=0.5)
    assert not torch.equal(at[0], at[1])


def test_no_masks_need_no_points() -> None:
    assert uncertain_points(torch.zeros(0, 1, 8, 8), points=5, oversampling=3.0, importance=0.75).shape == (0, 5, 2)
