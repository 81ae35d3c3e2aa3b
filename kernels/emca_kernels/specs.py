"""What an operator costs at least, by its shapes alone, and how exact it is: shared by tests, benchmarks and measurements. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

FORWARD, FORWARD_BACKWARD = "forward", "forward_backward"
"""Passes: the result alone, or the result and then the gradients of features and queries."""

FLOAT32_BYTES, INDEX_BYTES, MASK_BYTES = 4, 8, 1
"""Per element of a normaliser, of an index, and of a mask held as bools."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Shapes of a call: B images, P pixels, Q queries, C channels, and what an element of the features takes."""

    batch: int
    pixels: int
    queries: int
    width: int
    itemsize: int = 4
    """Bytes of an element of features and queries."""
    masked: bool = True
    """Whether there is a mask bool [B, Q, P]."""
    heads: int = 1
    """Heads that the channels are split over, where each samples for itself."""
    samples: int = 0
    """Of a query and head, where queries sample pixels instead of seeing all."""


@dataclass(frozen=True)
class Array:
    """A tensor by its shape; one that is differentiable gets a gradient of its own size in a backward pass."""

    shape: tuple[int, ...]
    itemsize: int
    differentiable: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.itemsize


def _features_and_queries(sizes: Sizes) -> dict[str, Array]:
    batch, pixels, queries, width = sizes.batch, sizes.pixels, sizes.queries, sizes.width
    found = {
        "features": Array((batch, pixels, width), sizes.itemsize, differentiable=True),
        "queries": Array((batch, queries, width), sizes.itemsize, differentiable=True),
    }
    return found | ({"allowed": Array((batch, queries, pixels), MASK_BYTES)} if sizes.masked else {})


def _all_pairs(sizes: Sizes) -> int:
    return sizes.batch * sizes.pixels * sizes.queries * sizes.width


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """Floating-point operations and least memory traffic of an operator.

    A backward pass reads what the forward pass read and returned, and the gradient of the first result; it writes the gradients.
    What an implementation keeps or recomputes beyond that is its own business, and lowers the share of the bound that it reaches.
    """

    name: str
    products: Mapping[str, int]
    """By pass: how many times all that `meetings` counts meet in a multiply-add. A pass that is not there does not exist."""
    projections: Mapping[str, int] = field(default_factory=dict)
    """By pass: how many times every query meets a matrix [C, C]."""
    parameters: Callable[[Sizes], Mapping[str, Array]] = lambda _: {}
    """What it reads beside its arguments."""
    results: Callable[[Sizes], Mapping[str, Array]]
    """What the operator writes, the differentiable one first."""
    tolerance: Mapping[str, float]
    """By dtype: largest error beside the float64 reference, relative to its largest value; for a choice, the regret of its score."""

    arguments: Callable[[Sizes], dict[str, Array]] = _features_and_queries
    """What the operator is called with, each element read once."""
    meetings: Callable[[Sizes], int] = _all_pairs
    """What meets in multiply-adds: every pixel, query and channel."""

    def flops(self, sizes: Sizes, pass_: str = FORWARD) -> int:
        """Floating-point operations, two per multiply-add, masked pixels included."""
        projected = self.projections.get(pass_, 0) * sizes.batch * sizes.queries * sizes.width**2
        return 2 * (self._products(pass_) * self.meetings(sizes) + projected)

    def bytes(self, sizes: Sizes, pass_: str = FORWARD) -> int:
        """Least traffic in bytes: every argument read once, every result written once."""
        self._products(pass_)
        arguments, results = {**self.arguments(sizes), **self.parameters(sizes)}, self.results(sizes)
        forward = sum(array.nbytes for array in (*arguments.values(), *results.values()))
        if pass_ == FORWARD:
            return forward
        incoming = next(iter(results.values())).nbytes
        return 2 * forward + incoming + sum(array.nbytes for array in arguments.values() if array.differentiable)

    def _products(self, pass_: str) -> int:
        if pass_ not in self.products:
            raise ValueError(f"{self.name} has no pass {pass_!r}; its passes: {', '.join(self.products)}")
        return self.products[pass_]


def _choices(sizes: Sizes) -> dict[str, Array]:
    shape = (sizes.batch, sizes.queries)
    return {"indices": Array(shape, INDEX_BYTES), "scores": Array(shape, sizes.itemsize)}


def _pooled(sizes: Sizes) -> dict[str, Array]:
    pooled = Array((sizes.batch, sizes.queries, sizes.width), sizes.itemsize, differentiable=True)
    return {"pooled": pooled, "logsumexp": Array((sizes.batch, sizes.queries), FLOAT32_BYTES)}


def _scores(sizes: Sizes) -> dict[str, Array]:
    return {"scores": Array((sizes.batch, sizes.queries, sizes.pixels), sizes.itemsize)}


def _attended(sizes: Sizes) -> dict[str, Array]:
    shape = (sizes.batch, sizes.queries, sizes.width)
    queries = Array(shape, sizes.itemsize, differentiable=True)
    return {"updated": queries, "rows": Array(shape, sizes.itemsize), "indices": Array(shape[:2], INDEX_BYTES)}


def _layer_parameters(sizes: Sizes) -> dict[str, Array]:
    matrix, vector = (Array((sizes.width,) * dims, sizes.itemsize, differentiable=True) for dims in (2, 1))
    layers = {f"{name}_{kind}": array for name in ("query", "key", "product") for kind, array in (("weight", matrix), ("bias", vector))}
    return layers | {"alpha": vector, "out_weight": matrix, "out_bias": vector}


SELECT_PROTOTYPES = OpSpec(
    name="select_prototypes",
    # no gradient flows through a choice
    products={FORWARD: 1},
    results=_choices,
    tolerance={"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-5, "float16": 1e-5},
)
POOL_PROTOTYPES = OpSpec(
    name="pool_prototypes",
    # scores and weighted sum; backward: scores again, gradient by features, two products into features, one into queries
    products={FORWARD: 2, FORWARD_BACKWARD: 7},
    results=_pooled,
    tolerance={"float64": 1e-12, "float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3},
)
EMCA_ATTENTION = OpSpec(
    name="emca_attention",
    # one pixel per query: only the forward pass sees all pixels
    products={FORWARD: 1, FORWARD_BACKWARD: 1},
    # query, fold, key, product, out; backward: the first three but the fold again, and two gradients of each but the fold
    projections={FORWARD: 5, FORWARD_BACKWARD: 16},
    parameters=_layer_parameters,
    results=_attended,
    tolerance={"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3},
)
"""The whole layer, D = C, choosing one pixel per query."""
SCORES = OpSpec(
    name="scores",
    products={FORWARD: 1},
    results=_scores,
    tolerance={"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3},
)
"""The score matrix alone, as a bare batched matrix product: what selection saves writing."""


def _sampling(sizes: Sizes) -> dict[str, Array]:
    samples = (sizes.batch, sizes.queries, sizes.heads, sizes.samples)
    return {
        "value": Array((sizes.batch, sizes.pixels, sizes.width), sizes.itemsize, differentiable=True),
        "locations": Array((*samples, 2), sizes.itemsize, differentiable=True),
        "weights": Array(samples, sizes.itemsize, differentiable=True),
    }


def _sampling_from_offsets(sizes: Sizes) -> dict[str, Array]:
    return {"reference_points": Array((sizes.queries, 2), FLOAT32_BYTES), **_sampling(sizes)}


def _sampled(sizes: Sizes) -> dict[str, Array]:
    return {"attended": Array((sizes.batch, sizes.queries, sizes.width), sizes.itemsize, differentiable=True)}


def _corners(sizes: Sizes) -> int:
    """Four corners of every sample of a query and head, with the channels of the head."""
    return sizes.batch * sizes.queries * sizes.samples * 4 * sizes.width


DEFORMABLE_ATTENTION = OpSpec(
    name="deformable_attention",
    # backward: of the values, and of their weights
    products={FORWARD: 1, FORWARD_BACKWARD: 3},
    results=_sampled,
    tolerance={"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3},
    arguments=_sampling,
    meetings=_corners,
)
DEFORMABLE_ATTENTION_FROM_OFFSETS = replace(
    DEFORMABLE_ATTENTION, name="deformable_attention_from_offsets", arguments=_sampling_from_offsets
)
MS_DEFORM_ATTN = replace(DEFORMABLE_ATTENTION, name="ms_deform_attn")
"""The compiled operator of PyPI's torch-ms-deform-attn, a rival."""

SAMPLERS = (DEFORMABLE_ATTENTION, DEFORMABLE_ATTENTION_FROM_OFFSETS, MS_DEFORM_ATTN)
SPECS = {spec.name: spec for spec in (SELECT_PROTOTYPES, POOL_PROTOTYPES, EMCA_ATTENTION, SCORES, *SAMPLERS)}
