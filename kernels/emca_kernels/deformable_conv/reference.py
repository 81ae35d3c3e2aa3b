"""Readable definition of the modulated deformable convolution: the oracle of every faster backend. Differentiable by autograd.

Shape suffixes: N taps of the kernel, h and w of the output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def deformable_conv(
    features_BCHW: Tensor, offsets_BThw: Tensor, masks_BNhw: Tensor, weight_OCyx: Tensor, *, stride: int, padding: int, dilation: int
) -> Tensor:
    """See `emca_kernels.deformable_conv`."""
    height, width = features_BCHW.shape[-2:]
    rows, columns = weight_OCyx.shape[-2:]
    # half precision cannot hold the positions of a large map
    exact = torch.promote_types(features_BCHW.dtype, torch.float32)
    offsets_BN2hw = offsets_BThw.to(exact).unflatten(1, (rows * columns, 2))

    def count(size: int) -> Tensor:
        return torch.arange(size, device=features_BCHW.device, dtype=exact)

    tap_y_N = (count(rows) * dilation - padding).repeat_interleave(columns)
    tap_x_N = (count(columns) * dilation - padding).repeat(rows)
    y_BNhw = offsets_BN2hw[:, :, 0] + tap_y_N[:, None, None] + stride * count(masks_BNhw.shape[2])[:, None]
    x_BNhw = offsets_BN2hw[:, :, 1] + tap_x_N[:, None, None] + stride * count(masks_BNhw.shape[3])
    grid_BNp2 = torch.stack([(2 * x_BNhw + 1) / width - 1, (2 * y_BNhw + 1) / height - 1], -1).flatten(2, 3)
    sampled_BCNp = F.grid_sample(features_BCHW.to(exact), grid_BNp2, mode="bilinear", padding_mode="zeros", align_corners=False)
    modulated_BCNp = (sampled_BCNp * masks_BNhw.flatten(2)[:, None]).to(features_BCHW.dtype)
    convolved_BOp = weight_OCyx.flatten(1) @ modulated_BCNp.flatten(1, 2)
    return convolved_BOp.unflatten(-1, masks_BNhw.shape[2:])
