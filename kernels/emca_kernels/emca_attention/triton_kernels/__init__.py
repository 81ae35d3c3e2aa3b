"""The whole layer on GPUs in two launches.

The first (`search`) projects and folds its block of queries (`project`), then streams its span of pixels past them with the loops of
selection and soft prototypes. The second (`attend`) merges the spans, and carries each query's one row through the rest of the layer.
`launch` makes both from a call; what they are given is in `arguments`. See kernels/README.md.
"""

from emca_kernels.emca_attention.triton_kernels.launch import emca_attention, plan, variants

__all__ = ["emca_attention", "plan", "variants"]
