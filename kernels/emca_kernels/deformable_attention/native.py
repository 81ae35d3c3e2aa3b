"""Multi-scale deformable attention on CPUs: samples are gathered and summed in registers, nothing of their number is written."""

from __future__ import annotations

import torch
from torch import Tensor

from emca_kernels.deformable_attention.layout import reachable
from emca_kernels.deformable_attention.reference import Shapes


def deformable_attention(value_BPMd: Tensor, shapes: Shapes, locations_BQMLN2: Tensor, weights_BQMLN: Tensor) -> Tensor:
    """See `emca_kernels.deformable_attention`; sums are float32."""
    return _attend(value_BPMd, shapes, locations_BQMLN2, weights_BQMLN, None)


def deformable_attention_from_offsets(
    value_BPMd: Tensor, shapes: Shapes, reference_BQL2: Tensor, offsets_BQMLN2: Tensor, logits_BQMLN: Tensor
) -> Tensor:
    """See `emca_kernels.deformable_attention_from_offsets`; neither locations nor weights are written."""
    reference_BQL2 = reference_BQL2.float()
    if reference_BQL2.stride(-1) != 1:
        reference_BQL2 = reference_BQL2.contiguous()
    return _attend(value_BPMd, shapes, offsets_BQMLN2, logits_BQMLN, reference_BQL2)


def _attend(value_BPMd: Tensor, shapes: Shapes, places: Tensor, weights: Tensor, reference: Tensor | None) -> Tensor:
    arguments = reachable(value_BPMd), _flat(shapes), _exact(places), _exact(weights), reference
    return torch.ops.emca_native.deformable_attention(*arguments).flatten(2).to(value_BPMd.dtype)


def backward(
    gradient_BQC: Tensor, value_BPMd: Tensor, shapes: Shapes, locations_BQMLN2: Tensor, weights_BQMLN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights; the same bits for any number of threads."""
    given = reachable(value_BPMd), _flat(shapes), _exact(locations_BQMLN2), _exact(weights_BQMLN)
    of_value, of_locations, of_weights = torch.ops.emca_native.deformable_attention_backward(_exact(gradient_BQC), *given)
    return of_value.to(value_BPMd.dtype), of_locations.to(locations_BQMLN2.dtype), of_weights.to(weights_BQMLN.dtype)


def _exact(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()


def _flat(shapes: Shapes) -> list[int]:
    return [size for shape in shapes for size in shape]
