"""Operators of torch: one opaque boundary each, so that torch.compile, export, FakeTensor and the FLOP counter know them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

_LIBRARY = torch.library.Library("emca", "DEF")
_IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {}


def register_operator(
    schema: str, implementation: Callable[..., Any], *, fake: Callable[..., Any], flops: Callable[..., int]
) -> Callable[..., Any]:
    """Define `torch.ops.emca.<name>` and return it.

    Args:
        schema: "name(Tensor features, ...) -> Tensor".
        implementation: from tensors of any device; picks a backend.
        fake: the same signature, to tensors of the right shape, dtype and device, without values.
        flops: from the shapes of the arguments, in their order, to floating-point operations.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"emca::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.emca, name)
    register_flop_formula(operator)(flops)
    _IMPLEMENTATIONS[operator.default] = implementation
    return operator.default


def register_gradient(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Make `torch.ops.emca.<name>` differentiable, for operators that take sizes.

    An `autograd.Function` around such an operator keeps the sizes for its backward pass, which torch's compiler cannot follow where sizes
    are symbols.

    Args:
        name: of a registered operator.
        setup_context: (ctx, inputs, output), keeps what the backward pass needs.
        backward: (ctx, *gradients) to a gradient or None per argument.
    """
    torch.library.register_autograd(f"emca::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


def reference_decompositions() -> dict[Any, Callable[..., Any]]:
    """Every operator as standard operators of torch, for `torch.export.ExportedProgram.run_decompositions` and `make_fx`."""
    return {operator: _by_reference(operator, implementation) for operator, implementation in _IMPLEMENTATIONS.items()}


def _by_reference(operator: Any, implementation: Callable[..., Any]) -> Callable[..., Any]:
    schema = operator._schema.arguments

    def call(*given: Any, **named: Any) -> Any:
        values = {argument.name: argument.default_value for argument in schema}
        values |= dict(zip(values, given, strict=False)) | named
        if "backend" in values:
            values["backend"] = "reference"
        return implementation(*values.values())

    return call
