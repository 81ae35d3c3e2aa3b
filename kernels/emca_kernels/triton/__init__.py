"""What the Triton kernels share: tiles, tile sizes per architecture, launching, and the check that compiles them without a GPU.

Importing this package imports no triton; `tiles` and the kernels of the operators do.
"""
