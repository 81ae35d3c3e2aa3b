"""Multi-scale deformable attention on GPUs: a program holds a block of queries of one head and gathers its samples one after the other.

Backward, samples of different queries fall on the same pixel: gradients of values are added by atomics, in no fixed order. `kernels` is
the device code, `launch` calls it. See kernels/README.md.
"""

from emca_kernels.deformable_attention.triton_kernels.launch import (
    backward,
    deformable_attention,
    deformable_attention_from_offsets,
    variants,
)

__all__ = ["backward", "deformable_attention", "deformable_attention_from_offsets", "variants"]
