"""Mask2Former with a pluggable cross-attention: one file per box of the paper's figure.

Shape suffixes: B images, Q queries, P pixels of a level, C model width, D key width, M heads, K prototypes, L levels.
"""

from emca_bench.models.attention import ATTENTIONS, CrossAttention, build_attention
from emca_bench.models.build import MODELS, build_model
from emca_bench.models.checkpoints import LoadReport, load_checkpoint
from emca_bench.models.predictions import Predictions

__all__ = ["ATTENTIONS", "MODELS", "CrossAttention", "LoadReport", "Predictions", "build_attention", "build_model", "load_checkpoint"]
