"""The same layers through oneDNN, with the ReLU and the residual inside of the product that makes them.

Layers keep their parameters and names: they get a class that calls other operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from emca_bench.models.attention.masked import MaskedCrossAttention
from emca_bench.models.backbones import resnet
from emca_bench.models.mask_decoder import FFNLayer, MaskDecoder, SelfAttention
from emca_bench.onednn import linear


def use_onednn_layers(model: nn.Module) -> None:
    """Give every layer that there is a class for its class, in place."""
    for module in model.modules():
        faster = _FASTER.get(type(module))
        if faster is not None:
            # as FSDP does it: the instance keeps its state and gets a class that knows more
            module.__class__ = faster


class Linear(nn.Linear):
    """A linear layer."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., C] to [..., C']."""
        return linear(input, self.weight, self.bias)


class Conv2d(resnet.Conv2d):
    """Convolution, folded norm and ReLU in one."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, h, w] to [B, C', h', w']."""
        if hasattr(self, "norm") or self.padding_mode != "zeros":
            return super().forward(input)
        return torch.ops.mkldnn._convolution_pointwise(
            input, self.weight, self.bias, *_geometry(self), "relu" if self.relu else "none", [], ""
        )

    def add(self, input: Tensor, other: Tensor) -> Tensor:
        """ReLU of the convolution plus `other`, which is overwritten."""
        binary: Any = torch.ops.mkldnn._convolution_pointwise_.binary
        return binary(other, input, self.weight, self.bias, *_geometry(self), "add", 1.0, "relu", [], "")


def _geometry(conv: nn.Conv2d) -> tuple[Any, ...]:
    return conv.padding, conv.stride, conv.dilation, conv.groups


class Block(resnet.Block):
    """A residual block whose last convolution adds the shortcut and applies the ReLU."""

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, h, w] to [B, C', h / stride, w / stride]."""
        last: Any = self.conv3 if hasattr(self, "conv3") else self.conv2
        if hasattr(last, "norm") or last.weight.requires_grad:
            return super().forward(features)
        update = self.conv1(features)
        if last is not self.conv2:
            update = self.conv2(update)
        # a map that the network returns is only ever followed by a block with a shortcut of its own, and so never overwritten
        return last.add(update, self.shortcut(features) if hasattr(self, "shortcut") else features)


class FastSelfAttention(SelfAttention):
    """Projections of the queries."""

    project = staticmethod(linear)  # type: ignore[assignment]


class FastMaskedCrossAttention(MaskedCrossAttention):
    """Projections of queries and pixels."""

    project = staticmethod(linear)  # type: ignore[assignment]


class FastFFNLayer(FFNLayer):
    """The ReLU inside of the first product."""

    def _hidden(self, content: Tensor) -> Tensor:
        return linear(content, self.linear1.weight, self.linear1.bias, relu=True)


class FastMaskDecoder(MaskDecoder):
    """Products of mask embeddings and pixels."""

    @staticmethod
    def score(embedding_BQE: Tensor, features_BPE: Tensor) -> Tensor:
        """Dot products [B, Q, P]."""
        if len(embedding_BQE) == 1:
            return linear(embedding_BQE, features_BPE[0])
        logits_BQP = embedding_BQE.new_empty(*embedding_BQE.shape[:2], features_BPE.shape[1])
        for logits_QP, embedding_QE, features_PE in zip(logits_BQP, embedding_BQE, features_BPE, strict=True):
            logits_QP.copy_(linear(embedding_QE, features_PE))
        return logits_BQP


_FASTER: dict[type, type] = {
    nn.Linear: Linear,
    # its own class, which MultiheadAttention does not let see a subclass of Linear
    nn.modules.linear.NonDynamicallyQuantizableLinear: Linear,
    resnet.Conv2d: Conv2d,
    resnet.Block: Block,
    SelfAttention: FastSelfAttention,
    MaskedCrossAttention: FastMaskedCrossAttention,
    FFNLayer: FastFFNLayer,
    MaskDecoder: FastMaskDecoder,
}
