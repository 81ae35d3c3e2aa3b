"""The operator `attend_prototypes`: checks, backend, call."""

from __future__ import annotations

from torch import Tensor

from emca_kernels.attend_prototypes import reference
from emca_kernels.autocast import follow_autocast
from emca_kernels.backends import Backend, choose_backend, register_backend, serves_all
from emca_kernels.checks import check_same, check_tensor

NORM_AXES = ("row", "queries", "none")

register_backend("attend_prototypes", Backend("reference", reference.attend_prototypes, serves_all))


def attend_prototypes(
    prototypes: Tensor,
    queries: Tensor,
    product_weight: Tensor | None,
    product_bias: Tensor | None,
    alpha: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    *,
    norm_axis: str = "row",
    backend: str | None = None,
) -> Tensor:
    """`A = (Q * Kp) W_A^T + b_A`, then `(alpha * A / ||A|| + Kp) W_out^T + b_out`; the residual is the caller's.

    Source: EMCA, equations of A, B and Q_out (SPEC section 1).

    Args:
        prototypes: [B, Q, D] one prototype row per query (heads concatenated).
        queries: [B, Q, D] projected queries.
        product_weight, product_bias: W_A [D, D] and b_A [D], or None both: A = Q * Kp.
        alpha: [D].
        out_weight, out_bias: W_out [C, D] and b_out [C].
        norm_axis: "row" takes the 2-norm over D, "queries" per channel over the queries, as PEM's code does. At least 1e-12. "none"
            leaves A as it is.
        backend: a backend's name, for tests and measurements.

    Returns:
        [B, Q, C].

    Raises:
        TypeError, ValueError: naming the argument, what was found and what was expected.
    """
    sizes: dict[str, int] = {}
    check_tensor("prototypes", prototypes, ("B", "Q", "D"), sizes)
    check_tensor("queries", queries, ("B", "Q", "D"), sizes)
    if (product_weight is None) != (product_bias is None):
        missing, given = ("product_weight", "product_bias") if product_weight is None else ("product_bias", "product_weight")
        raise ValueError(f"{missing} is None but {given} is not, expected both or neither")
    if product_weight is not None:
        check_tensor("product_weight", product_weight, ("E", "D"), {**sizes, "E": sizes["D"]})
    if product_bias is not None:
        check_tensor("product_bias", product_bias, ("D",), sizes)
    check_tensor("alpha", alpha, ("D",), sizes)
    check_tensor("out_weight", out_weight, ("C", "D"), sizes)
    check_tensor("out_bias", out_bias, ("C",), sizes)
    prototypes, queries, product_weight, product_bias, alpha, out_weight, out_bias = follow_autocast(
        prototypes, queries, product_weight, product_bias, alpha, out_weight, out_bias
    )
    for name, parameter in (
        ("queries", queries),
        ("product_weight", product_weight),
        ("product_bias", product_bias),
        ("alpha", alpha),
        ("out_weight", out_weight),
        ("out_bias", out_bias),
    ):
        if parameter is not None:
            check_same("prototypes", prototypes, name, parameter)
    if norm_axis not in NORM_AXES:
        raise ValueError(f"norm_axis={norm_axis!r}, expected one of {', '.join(NORM_AXES)}")
    chosen, _ = choose_backend("attend_prototypes", prototypes, queries, asked=backend)
    return chosen.implementation(prototypes, queries, product_weight, product_bias, alpha, out_weight, out_bias, norm_axis=norm_axis)
