"""Soft prototypes on GPUs: one pass over the pixels with a running maximum and sum, weights are never written.

A query whose mask is empty pools everywhere, and which one that is shows only at the end. So each starts by pooling everything, and starts
anew, masked, at the first pixel that it is allowed. `kernels` is the device code, `launch` calls it. See kernels/README.md.
"""

from emca_kernels.pool_prototypes.triton_kernels.launch import plan, pool_prototypes, variants

__all__ = ["plan", "pool_prototypes", "variants"]
