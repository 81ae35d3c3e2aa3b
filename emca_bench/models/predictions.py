"""What a mask-classification model returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from emca_bench.models.mask_logits import Masks

MASK_STRIDE = 4
"""Pixels of the input, in each direction, that one pixel of the mask logits stands for."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """A class and a mask per query.

    Attributes:
        class_logits: [B, Q, classes + 1], the last one is "no object".
        masks: mask logits [B, Q, H / 4, W / 4] of the padded input: a tensor, or in training what they are a product of.
        image_size: (H, W) of the input before padding; masks cover it from the top left corner.
        auxiliary: the predictions before the first and after each decoder layer but the last, for deep supervision; only where the
            model was asked for them.
    """

    class_logits: Tensor
    masks: Masks
    image_size: tuple[int, int]
    auxiliary: tuple[Predictions, ...] = field(default=())

    @property
    def mask_logits(self) -> Tensor:
        """[B, Q, H / 4, W / 4] of the padded input; where there is a product, made at each call."""
        return self.masks if isinstance(self.masks, Tensor) else self.masks.dense()
