"""Prototype attention and its relatives as operators: needs torch alone; every operator names the backend that serves a call.

Shape suffixes: B images, Q queries, P pixels of a level, C width, D key width, M heads, K prototypes, L levels.
"""

from emca_kernels.attend_prototypes.op import attend_prototypes
from emca_kernels.backends import explain_backend
from emca_kernels.deformable_attention.op import deformable_attention, deformable_attention_from_offsets
from emca_kernels.deformable_conv.op import deformable_conv
from emca_kernels.emca_attention.arguments import Projections
from emca_kernels.emca_attention.op import emca_attention
from emca_kernels.pool_prototypes.op import pool_prototypes
from emca_kernels.select_prototypes.op import select_prototypes

__all__ = [
    "Projections",
    "attend_prototypes",
    "deformable_attention",
    "deformable_attention_from_offsets",
    "deformable_conv",
    "emca_attention",
    "explain_backend",
    "pool_prototypes",
    "select_prototypes",
]
