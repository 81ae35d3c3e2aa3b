"""Reproducible benchmark and ablation suite for efficient masked cross-attention (EMCA) in Mask2Former."""

__version__ = "0.1.0"
