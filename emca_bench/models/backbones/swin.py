"""Swin transformer with the original's parameter names, so that Mask2Former's checkpoints load without a map.

Shape suffixes: B images, H and W of a map, V windows of it, N pixels of a window, C channels, M heads, d channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emca_bench.errors import UsageError
from emca_bench.models.backbones.base import BACKBONES, LEVELS, Backbone

PATCH = 4
BLOCKED = -100.0
"""Added to the scores of pixels of other regions: the original's constant."""


class PatchEmbed(nn.Module):
    """4x4 patches to channels, and a layer norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, stride=PATCH)
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, H / 4, W / 4, C], rounded up."""
        height, columns = images.shape[-2:]
        padded = F.pad(images, (0, -columns % PATCH, 0, -height % PATCH))
        return self.norm(self.proj(padded).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """2x2 neighbours side by side, a layer norm, and a projection to twice the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, features_BHWC: Tensor) -> Tensor:
        """[B, H, W, C] to [B, H / 2, W / 2, 2C], rounded up."""
        padded = _pad_to_multiples(features_BHWC, 2)
        # columns outside, rows inside: the order that published weights expect
        quarters = [padded[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(quarters, -1)))


class WindowAttention(nn.Module):
    """Self-attention inside windows, with a learned bias for each relative position."""

    def __init__(self, width: int, *, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.relative_position_index: Tensor
        self.register_buffer("relative_position_index", relative_position_index(window))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, windows_BVNC: Tensor, mask_VNN: Tensor | None) -> Tensor:
        """[B, V, N, C] to the same shape; the mask is added to the scores."""
        q_BVMNd, k_BVMNd, v_BVMNd = self.qkv(windows_BVNC).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        bias_MNN = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        scores_BVMNN = (q_BVMNd * self.scale) @ k_BVMNd.mT + bias_MNN
        if mask_VNN is not None:
            scores_BVMNN = scores_BVMNN + mask_VNN[:, None]
        attended_BVMNd = scores_BVMNN.softmax(-1) @ v_BVMNd
        return self.proj(attended_BVMNd.transpose(2, 3).flatten(3))


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, features: Tensor) -> Tensor:
        """[..., C] to the same shape."""
        return self.fc2(F.gelu(self.fc1(features)))


class SwinBlock(nn.Module):
    """Attention in windows, moved by `shift` pixels, and an MLP; pre-norm.

    Args:
        width: C.
        heads: of the attention.
        window: its side in pixels.
        shift: 0, or half a window in every other block.
        drop_path: probability that an image skips a residual branch in training.
    """

    def __init__(self, width: int, *, heads: int, window: int, shift: int, drop_path: float) -> None:
        super().__init__()
        self.window, self.shift, self.drop_path = window, shift, drop_path
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads=heads, window=window)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, features_BHWC: Tensor, shifted_mask_VNN: Tensor) -> Tensor:
        """[B, H, W, C] to the same shape; the mask is used if the windows are shifted."""
        features_BHWC = features_BHWC + self._dropped(self._attend(self.norm1(features_BHWC), shifted_mask_VNN))
        return features_BHWC + self._dropped(self.mlp(self.norm2(features_BHWC)))

    def _attend(self, features_BHWC: Tensor, shifted_mask_VNN: Tensor) -> Tensor:
        height, columns = features_BHWC.shape[1:3]
        padded = _pad_to_multiples(features_BHWC, self.window)
        if self.shift:
            padded = padded.roll((-self.shift, -self.shift), (1, 2))
        windows_BVNC = split_windows(padded, self.window)
        attended_BVNC = self.attn(windows_BVNC, shifted_mask_VNN if self.shift else None)
        joined = join_windows(attended_BVNC, self.window, columns=padded.shape[2])
        if self.shift:
            joined = joined.roll((self.shift, self.shift), (1, 2))
        return joined[:, :height, :columns]

    def _dropped(self, branch_BHWC: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch_BHWC
        kept = torch.rand(branch_BHWC.shape[0], 1, 1, 1, device=branch_BHWC.device) >= self.drop_path
        return branch_BHWC * kept / (1 - self.drop_path)


class SwinStage(nn.Module):
    """Blocks at one stride; `downsample`, if there is one, leads to the next."""

    def __init__(self, width: int, *, heads: int, window: int, drop_paths: list[float], downsample: bool) -> None:
        super().__init__()
        self.window, self.shift = window, window // 2
        self.blocks = nn.ModuleList(
            SwinBlock(width, heads=heads, window=window, shift=self.shift if index % 2 else 0, drop_path=drop_path)
            for index, drop_path in enumerate(drop_paths)
        )
        self.downsample = PatchMerging(width) if downsample else None

    def forward(self, features_BHWC: Tensor) -> Tensor:
        """[B, H, W, C] to the same shape."""
        mask_VNN = shifted_window_mask(features_BHWC, self.window, self.shift)
        for block in self.blocks:
            features_BHWC = block(features_BHWC, mask_VNN)
        return features_BHWC


class SwinTransformer(Backbone):
    """Swin transformer; images and maps of any size are padded to whole patches and windows.

    Source: Liu et al., Swin Transformer, 2021, in the form of its semantic segmentation, which Mask2Former uses: a layer norm on
    every map, no position embedding.

    Args:
        embed_dim: channels at stride 4, doubled from stage to stage.
        depths: blocks of each of the four stages.
        num_heads: of each stage; they divide its channels.
        window_size: side of a window in pixels of the stage.
        drop_path_rate: of the last block in training; it grows linearly from 0 at the first.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depths: tuple[int, int, int, int],
        num_heads: tuple[int, int, int, int],
        window_size: int,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        if not 0 <= drop_path_rate < 1:
            raise UsageError(f"drop_path_rate={drop_path_rate} must be at least 0 and below 1")
        widths = [embed_dim * 2**stage for stage in range(len(LEVELS))]
        for width, heads in zip(widths, num_heads, strict=True):
            if heads < 1 or width % heads:
                raise UsageError(f"num_heads={list(num_heads)} must divide the channels {widths} of the stages")
        self.channels = dict(zip(LEVELS, widths, strict=True))
        self.patch_embed = PatchEmbed(embed_dim)
        total = sum(depths)
        drop_paths = [drop_path_rate * index / max(total - 1, 1) for index in range(total)]
        self.layers = nn.ModuleList()
        for stage, (width, depth, heads) in enumerate(zip(widths, depths, num_heads, strict=True)):
            stage_drop_paths, drop_paths = drop_paths[:depth], drop_paths[depth:]
            last = stage == len(LEVELS) - 1
            self.layers.append(SwinStage(width, heads=heads, window=window_size, drop_paths=stage_drop_paths, downsample=not last))
            self.add_module(f"norm{stage}", nn.LayerNorm(width))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See `Backbone.forward`; sizes that are no multiples of 32 are rounded up level by level."""
        features_BHWC = self.patch_embed(images)
        maps = {}
        for stage, (level, layer) in enumerate(zip(LEVELS, self.layers, strict=True)):
            features_BHWC = layer(features_BHWC)
            maps[level] = self.get_submodule(f"norm{stage}")(features_BHWC).permute(0, 3, 1, 2).contiguous()
            if isinstance(layer.downsample, PatchMerging):
                features_BHWC = layer.downsample(features_BHWC)
        return maps


def relative_position_index(window: int) -> Tensor:
    """Row of the bias table for each pair of pixels of a window: int64 [N, N]."""
    pixel_N = torch.arange(window * window)
    row_N, column_N = pixel_N // window, pixel_N % window
    down_NN = row_N[:, None] - row_N + window - 1
    right_NN = column_N[:, None] - column_N + window - 1
    return down_NN * (2 * window - 1) + right_NN


def split_windows(features_BHWC: Tensor, window: int) -> Tensor:
    """[B, H, W, C], whole windows, to [B, V, N, C], row by row."""
    parts = features_BHWC.unflatten(1, (-1, window)).unflatten(3, (-1, window))
    return parts.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def join_windows(windows_BVNC: Tensor, window: int, *, columns: int) -> Tensor:
    """The inverse of `split_windows` for a map of the given width."""
    parts = windows_BVNC.unflatten(1, (-1, columns // window)).unflatten(3, (window, window))
    return parts.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def shifted_window_mask(features_BHWC: Tensor, window: int, shift: int) -> Tensor:
    """What keeps pixels apart that only the shift brought into one window: [V, N, N], added to scores."""
    regions = []
    for size in features_BHWC.shape[1:3]:
        padded = size + -size % window
        position = torch.arange(padded, device=features_BHWC.device)
        regions.append((position >= padded - window).long() + (position >= padded - shift))
    region_HW = 3 * regions[0][:, None] + regions[1]
    region_VN = split_windows(region_HW[None, ..., None], window)[0, ..., 0]
    apart_VNN = region_VN[:, :, None] != region_VN[:, None, :]
    return BLOCKED * apart_VNN.to(features_BHWC.dtype)


def _pad_to_multiples(features_BHWC: Tensor, multiple: int) -> Tensor:
    height, columns = features_BHWC.shape[1:3]
    return F.pad(features_BHWC, (0, 0, 0, -columns % multiple, 0, -height % multiple))


@BACKBONES.register("swin_tiny")
def swin_tiny(*, drop_path_rate: float = 0.3) -> SwinTransformer:
    """Swin-T, 27.5 M parameters."""
    return SwinTransformer(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), window_size=7, drop_path_rate=drop_path_rate)


@BACKBONES.register("swin_small")
def swin_small(*, drop_path_rate: float = 0.3) -> SwinTransformer:
    """Swin-S, 48.8 M parameters."""
    return SwinTransformer(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), window_size=7, drop_path_rate=drop_path_rate)


@BACKBONES.register("swin_base")
def swin_base(*, drop_path_rate: float = 0.3) -> SwinTransformer:
    """Swin-B with windows of 12 pixels (pretrained at 384x384), 86.9 M parameters."""
    return SwinTransformer(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), window_size=12, drop_path_rate=drop_path_rate)


@BACKBONES.register("swin_large")
def swin_large(*, drop_path_rate: float = 0.3) -> SwinTransformer:
    """Swin-L with windows of 12 pixels (pretrained at 384x384), 195.2 M parameters."""
    return SwinTransformer(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), window_size=12, drop_path_rate=drop_path_rate)
