"""The operator `deformable_conv`: checks, backend, call."""

from __future__ import annotations

from torch import Tensor

from emca_kernels.backends import Backend, choose_backend, register_backend, serves_all
from emca_kernels.checks import check_same, check_tensor
from emca_kernels.deformable_conv import reference

register_backend("deformable_conv", Backend("reference", reference.deformable_conv, serves_all))


def deformable_conv(
    features: Tensor,
    offsets: Tensor,
    masks: Tensor,
    weight: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Convolution whose taps are moved by offsets and scaled by masks, per output pixel; one group, no bias.

    Source: Zhu et al., Deformable ConvNets v2, 2019, equation 1. Samples are bilinear, zeros beyond the border. Channels of
    `offsets` and `masks` are ordered as torchvision's `deform_conv2d` and detectron2 read them.

    Args:
        features: [B, C, H, W].
        offsets: [B, 2 * kh * kw, h, w] in pixels: for each tap, row by row, first y, then x.
        masks: [B, kh * kw, h, w], a factor for each tap, after the sigmoid.
        weight: [O, C, kh, kw].
        stride, padding, dilation: as in `torch.nn.functional.conv2d`, the same for both axes.
        backend: a backend's name, for tests and measurements.

    Returns:
        [B, O, h, w].

    Raises:
        TypeError, ValueError: naming the argument, what was found and what was expected.
    """
    for name, found, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if found < least:
            raise ValueError(f"{name}={found}, expected {least} or more")
    sizes: dict[str, int] = {}
    check_tensor("features", features, ("B", "C", "H", "W"), sizes)
    check_tensor("weight", weight, ("O", "C", "kh", "kw"), sizes)
    for axis, size, taps in (("h", sizes["H"], sizes["kh"]), ("w", sizes["W"], sizes["kw"])):
        sizes[axis] = (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
        if sizes[axis] < 1:
            raise ValueError(f"features has shape {list(features.shape)}: padding={padding} leaves no room for {taps} taps along {axis}")
    sizes |= {"2*kh*kw": 2 * sizes["kh"] * sizes["kw"], "kh*kw": sizes["kh"] * sizes["kw"]}
    check_tensor("offsets", offsets, ("B", "2*kh*kw", "h", "w"), sizes)
    check_tensor("masks", masks, ("B", "kh*kw", "h", "w"), sizes)
    for name, tensor in (("offsets", offsets), ("masks", masks), ("weight", weight)):
        check_same("features", features, name, tensor)
    chosen, _ = choose_backend("deformable_conv", features, offsets, masks, weight, asked=backend)
    return chosen.implementation(features, offsets, masks, weight, stride=stride, padding=padding, dilation=dilation)
