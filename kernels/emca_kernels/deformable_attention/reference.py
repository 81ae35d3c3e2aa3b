"""Readable definition of multi-scale deformable attention: the oracle of every faster backend.

Half-precision values are sampled and summed in float32, since a position in 0..1 in half precision is off by pixels on large maps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = list[tuple[int, int]]


def deformable_attention(value_BPMd: Tensor, shapes: Shapes, locations_BQMLN2: Tensor, weights_BQMLN: Tensor) -> Tensor:
    """See `emca_kernels.deformable_attention`."""
    levels = _levels(value_BPMd, shapes, locations_BQMLN2)
    sampled_NdQLK = torch.stack([F.grid_sample(map_Ndhw, grid_NQK2, align_corners=False) for map_Ndhw, grid_NQK2 in levels], -2)
    sampled_BMdQLN = sampled_NdQLK.unflatten(0, (len(value_BPMd), value_BPMd.shape[2]))
    weights_BM1QLN = weights_BQMLN.to(sampled_BMdQLN.dtype).transpose(1, 2)[:, :, None]
    return (sampled_BMdQLN * weights_BM1QLN).sum((-2, -1)).permute(0, 3, 1, 2).flatten(2).to(value_BPMd.dtype)


def locations_and_weights(shapes: Shapes, reference_BQL2: Tensor, offsets_BQMLN2: Tensor, logits_BQMLN: Tensor) -> tuple[Tensor, Tensor]:
    """What `deformable_attention` takes, from what `deformable_attention_from_offsets` takes."""
    exact = torch.promote_types(offsets_BQMLN2.dtype, torch.float32)
    size_L12 = sizes_of(shapes, exact, offsets_BQMLN2.device)
    locations_BQMLN2 = reference_BQL2.to(exact)[:, :, None, :, None] + offsets_BQMLN2.to(exact) / size_L12
    return locations_BQMLN2, logits_BQMLN.to(exact).flatten(-2).softmax(-1).view_as(logits_BQMLN)


def sizes_of(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(columns, rows) of each level: [L, 1, 2]."""
    # not torch.tensor, which would turn the symbols of a compiled graph into numbers
    sizes = [torch.full((1,), size, dtype=dtype, device=device) for rows, columns in shapes for size in (columns, rows)]
    return torch.cat(sizes).view(-1, 1, 2)


def deformable_attention_from_offsets(
    value_BPMd: Tensor, shapes: Shapes, reference_BQL2: Tensor, offsets_BQMLN2: Tensor, logits_BQMLN: Tensor
) -> Tensor:
    """See `emca_kernels.deformable_attention_from_offsets`."""
    return deformable_attention(value_BPMd, shapes, *locations_and_weights(shapes, reference_BQL2, offsets_BQMLN2, logits_BQMLN))


def backward(
    gradient_BQC: Tensor, value_BPMd: Tensor, shapes: Shapes, locations_BQMLN2: Tensor, weights_BQMLN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, level by level."""
    images, _, heads, width = value_BPMd.shape
    of_values, of_locations, of_weights = [], [], []
    for level, (map_Ndhw, grid_NQK2) in enumerate(_levels(value_BPMd, shapes, locations_BQMLN2)):
        gradient_NdQ1 = gradient_BQC.to(map_Ndhw.dtype).unflatten(-1, (heads, width)).permute(0, 2, 3, 1).flatten(0, 1)[..., None]
        weights_N1QK = weights_BQMLN[:, :, :, level].to(map_Ndhw.dtype).transpose(1, 2).flatten(0, 1)[:, None]
        sampled_NdQK = F.grid_sample(map_Ndhw, grid_NQK2, align_corners=False)
        of_weights.append((sampled_NdQK * gradient_NdQ1).sum(1).unflatten(0, (images, heads)))
        # bilinear, zeros, pixel centres at halves, as grid_sample above
        of_map_Ndhw, of_grid_NQK2 = torch.ops.aten.grid_sampler_2d_backward(
            gradient_NdQ1 * weights_N1QK, map_Ndhw, grid_NQK2, 0, 0, False, [True, True]
        )
        of_values.append(of_map_Ndhw.flatten(2).unflatten(0, (images, heads)).permute(0, 3, 1, 2))
        of_locations.append(2 * of_grid_NQK2.unflatten(0, (images, heads)))
    return (
        torch.cat(of_values, 1).to(value_BPMd.dtype),
        torch.stack(of_locations, 3).transpose(1, 2).to(locations_BQMLN2.dtype),
        torch.stack(of_weights, 3).transpose(1, 2).to(weights_BQMLN.dtype),
    )


def _levels(value_BPMd: Tensor, shapes: Shapes, locations_BQMLN2: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each level its map [B * M, d, h, w] and the grid [B * M, Q, N, 2] of -1..1 that it is sampled at."""
    exact = torch.promote_types(torch.promote_types(value_BPMd.dtype, locations_BQMLN2.dtype), torch.float32)
    grids_NLQK2 = (2 * locations_BQMLN2.to(exact) - 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 1)
    parts = value_BPMd.to(exact).split([rows * columns for rows, columns in shapes], dim=1)
    maps = [part_BpMd.permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, shape) for part_BpMd, shape in zip(parts, shapes, strict=True)]
    return list(zip(maps, grids_NLQK2.unbind(1), strict=True))
