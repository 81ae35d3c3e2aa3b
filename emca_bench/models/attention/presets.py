"""The family of EMCA under the names that studies call: each a choice of switches."""

from __future__ import annotations

from emca_bench.models.attention.base import ATTENTIONS
from emca_bench.models.attention.emca import EMCA

# as the paper states it, with every switch of the family
ATTENTIONS.register("emca")(EMCA)


@ATTENTIONS.register("pem_ca")
def pem_ca(
    *,
    width: int,
    heads: int = 8,
    norm_axis: str = "row",
    residual: str = "raw",
    empty_mask: str = "everywhere",
    local_conv: bool = True,
) -> EMCA:
    """PEM-CA with the two defects of PEM's code mended: no coupling of queries, and an empty mask looks everywhere."""
    return EMCA(**locals(), normalize_keys=True, query_norm=True)


@ATTENTIONS.register("pem_ca_published")
def pem_ca_published(
    *,
    width: int,
    heads: int = 8,
    norm_axis: str = "queries",
    residual: str = "raw",
    empty_mask: str = "first_pixel",
    local_conv: bool = True,
) -> EMCA:
    """PEM-CA as PEM's code has it, its query-coupling norm and its empty-mask rule included: what PEM's checkpoints were trained with."""
    return EMCA(**locals(), normalize_keys=True, query_norm=True)


@ATTENTIONS.register("emca_soft")
def emca_soft(
    *,
    width: int,
    heads: int = 1,
    temperature: str = "learned",
    temperature_start: float = 1.0,
    head_split: str = "keys",
    residual: str = "raw",
    folded: bool | None = None,
    positions: bool = True,
    backend: str | None = None,
) -> EMCA:
    """Soft prototypes: one trainable softmax over the allowed pixels, keys and values folded (R6), EMCA's element-wise tail."""
    return EMCA(**locals(), selection="softmax")


@ATTENTIONS.register("mask_pooling")
def mask_pooling(
    *,
    width: int,
    heads: int = 1,
    residual: str = "projected",
    folded: bool | None = None,
    positions: bool = True,
    backend: str | None = None,
) -> EMCA:
    """The control: the mean of the allowed pixels instead of a search, all else as in EMCA."""
    return EMCA(**locals(), selection="mean")
