"""Prototype selection on GPUs: queries stay on chip, pixels stream past them once, the score matrix is never written.

Each program leaves the best keys of its span of pixels, a second small launch takes the best of all. A key orders candidates by
(allowed, score, lower pixel), so any order of merging gives the same bits. `kernels` is the device code, `launch` calls it. See
kernels/README.md.
"""

from emca_kernels.select_prototypes.triton_kernels.launch import plan, select_prototypes, variants

__all__ = ["plan", "select_prototypes", "variants"]
