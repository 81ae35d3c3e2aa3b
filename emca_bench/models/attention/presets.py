"""The family of EMCA under the names that studies call: each a choice of switches."""

from __future__ import annotations

from emca_bench.models.attention.base import ATTENTIONS
from emca_bench.models.attention.emca import EMCA


@ATTENTIONS.register("emca")
def emca(
    *,
    width: int,
    heads: int = 1,
    prototypes: int = 1,
    selection: str = "argmax",
    selection_gradient: str = "none",
    temperature: str = "learned",
    temperature_start: float = 1.0,
    head_split: str = "keys",
    normalize_keys: bool = False,
    local_conv: bool = False,
    query_norm: bool = False,
    alpha: str = "learned",
    product: str = "projected",
    norm_axis: str = "row",
    residual: str = "projected",
    positions: bool = True,
    empty_mask: str = "everywhere",
    folded: bool | None = None,
    query_init: str = "xavier",
    backend: str | None = None,
) -> EMCA:
    """EMCA as the paper states it."""
    return EMCA(**locals())


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
