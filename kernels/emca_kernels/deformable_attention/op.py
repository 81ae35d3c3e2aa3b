"""The operator `deformable_attention`: checks, backend, call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from emca_kernels.backends import Backend, choose_backend, register_backend, serves_all
from emca_kernels.checks import check_same, check_tensor, join_autocast
from emca_kernels.deformable_attention import reference

register_backend("deformable_attention", Backend("reference", reference.deformable_attention, serves_all))


def deformable_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Weighted sum of bilinear samples of several feature levels, per query and head.

    Source: Zhu et al., Deformable DETR, 2021, equation 3. Zeros beyond the border; sample positions are pixel centres at
    (i + 0.5) / size.

    Args:
        value: [B, P, M, d] values of all levels, one after the other, P = sum of h * w.
        spatial_shapes: (h, w) of each level.
        sampling_locations: [B, Q, M, L, N, 2] as (x, y) in 0..1 of each level, N points.
        attention_weights: [B, Q, M, L, N].
        backend: a backend's name, for tests and measurements.

    Returns:
        [B, Q, M * d].

    Raises:
        TypeError, ValueError: naming the argument, what was found and what was expected.
    """
    value, sampling_locations, attention_weights = join_autocast(value, sampling_locations, attention_weights, widest=True)
    shapes = [(int(height), int(width)) for height, width in spatial_shapes]
    sizes = {"L": len(shapes), "2": 2, "P": sum(height * width for height, width in shapes)}
    check_tensor("value", value, ("B", "P", "M", "d"), sizes)
    check_tensor("sampling_locations", sampling_locations, ("B", "Q", "M", "L", "N", "2"), sizes)
    check_tensor("attention_weights", attention_weights, ("B", "Q", "M", "L", "N"), sizes)
    check_same("value", value, "sampling_locations", sampling_locations)
    check_same("value", value, "attention_weights", attention_weights)
    chosen, _ = choose_backend("deformable_attention", value, sampling_locations, attention_weights, asked=backend)
    return chosen.implementation(value, shapes, sampling_locations, attention_weights)
