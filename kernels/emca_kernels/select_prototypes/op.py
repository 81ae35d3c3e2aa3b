"""The operator `select_prototypes`: checks, backend, call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emca_kernels.autocast import follow_autocast
from emca_kernels.backends import Backend, choose_backend, is_traced, register_backend, serves_all
from emca_kernels.checks import as_large, as_mask, check_divides, check_mask, check_position, check_same, check_tensor, once_per_signature
from emca_kernels.masks import Mask, allowed_of, from_parts, parts_of
from emca_kernels.native import library
from emca_kernels.registration import register_operator
from emca_kernels.select_prototypes import native, reference
from emca_kernels.select_prototypes.cuda import backend as cuda
from emca_kernels.triton import runtime

MAX_PIXELS = 1 << 30
"""Above, a packed 32-bit (score, index) key would overflow in the fast backends."""

register_backend("select_prototypes", Backend("reference", reference.select_prototypes, serves_all))
register_backend("select_prototypes", Backend("cuda", cuda.select_prototypes, cuda.refuses, cuda.refuses_unasked))
register_backend("select_prototypes", Backend("native", native.select_prototypes, library.refuses))
register_backend(
    "select_prototypes",
    Backend(
        "triton",
        runtime.lazily("emca_kernels.select_prototypes.triton_kernels", "select_prototypes"),
        runtime.refuses,
        runtime.refuses_unasked,
        reads_masks=True,
    ),
)


def _select(
    features: Tensor,
    queries: Tensor,
    allowed: Tensor | None,
    mask_features: Tensor | None,
    position: Tensor | None,
    k: int,
    heads: int,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    chosen, _ = choose_backend("select_prototypes", features, queries, allowed, mask_features, asked=backend)
    mask = from_parts(allowed, mask_features, features.shape[1])
    indices, scores = chosen.implementation(features, queries, mask if chosen.reads_masks else allowed_of(mask), position, k=k, heads=heads)
    return indices.contiguous(), scores.contiguous()


def _fake(
    features: Tensor,
    queries: Tensor,
    allowed: Tensor | None,
    mask_features: Tensor | None,
    position: Tensor | None,
    k: int,
    heads: int,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    shape = (*queries.shape[:2], heads, k)
    return queries.new_empty(shape, dtype=torch.int64), features.new_empty(shape)


def _flops(features: Any, queries: Any, allowed: Any, mask_features: Any, *_: Any, **__: Any) -> int:
    batch, pixels, width = features
    return 2 * batch * pixels * queries[1] * (width + (mask_features[2] if mask_features is not None else 0))


_operator = register_operator(
    "select_prototypes(Tensor features, Tensor queries, Tensor? allowed, Tensor? mask_features, Tensor? position, int k, int heads,"
    " str? backend) -> (Tensor, Tensor)",
    _select,
    fake=_fake,
    flops=_flops,
)


def select_prototypes(
    features: Tensor,
    queries: Tensor,
    allowed: Tensor | Mask | None = None,
    *,
    k: int = 1,
    heads: int = 1,
    position: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The K most similar allowed pixels of each query, per head.

    The score of a pixel is the dot product of its feature with the query, over the head's slice of channels. Of equal scores the
    lowest pixel index wins. A query with no allowed pixel may choose everywhere. No gradient flows.

    Source: EMCA and PEM-CA, the index set G (SPEC section 1).

    Args:
        features: [B, P, C] pixel features (or keys) of one level, floating point, any strides.
        queries: [B, Q, C] same dtype and device.
        allowed: bool [B, Q, P], True where the query may choose, or another mask of `emca_kernels.masks`; None allows everything.
        k: prototypes per query and head, 1 <= k <= P.
        heads: splits the channels; each head chooses its own pixels. Divides C.
        position: [P, C] or [B, P, C], B may be 1, of the same dtype: added to the features, without the sum ever being written by
            the fast backends.
        backend: a backend's name, for tests and measurements.

    Returns:
        indices int64 [B, Q, heads, k] and scores [B, Q, heads, k], best first. A slot that no allowed pixel is left for has score
        -inf and repeats the index of the first.

    Raises:
        TypeError, ValueError: naming the argument, what was found and what was expected.
    """
    features, queries, position = follow_autocast(features, queries, position)
    mask = as_mask(allowed)
    _check(features, queries, mask, position, k, heads)
    position = as_large(position, features)
    if is_traced(backend):
        return reference.select_prototypes(features, queries, allowed_of(mask), position, k=k, heads=heads)
    with torch.no_grad():
        return _operator(features, queries, *parts_of(mask), position, k, heads, backend)


@once_per_signature
def _check(features: Tensor, queries: Tensor, mask: Mask | None, position: Tensor | None, k: int, heads: int) -> None:
    sizes: dict[str, int] = {}
    check_tensor("features", features, ("B", "P", "C"), sizes)
    check_tensor("queries", queries, ("B", "Q", "C"), sizes)
    check_same("features", features, "queries", queries)
    check_position(position, features)
    check_mask(mask, sizes)
    check_divides("heads", heads, "C", sizes["C"])
    if not 1 <= k <= sizes["P"]:
        raise ValueError(f"k={k} prototypes from P={sizes['P']} pixels: expected 1 <= k <= P")
    if sizes["P"] >= MAX_PIXELS:
        raise ValueError(f"features has P={sizes['P']} pixels, expected fewer than {MAX_PIXELS}")
