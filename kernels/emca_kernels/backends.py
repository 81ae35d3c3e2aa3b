"""Which implementation serves a call, and why.

`EMCA_BACKEND` overrides the choice: a backend's name, for every operator that has it, or `operator=name` entries, separated by commas.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Backend:
    """One implementation of one operator."""

    name: str
    implementation: Callable[..., Any]
    refuses: Callable[..., str | None]
    """From the call's tensors to the reason why this backend cannot serve them, or None if it can."""
    refuses_unasked: Callable[..., str | None] = lambda *_: None
    """The same, for a backend that serves some calls only when it is asked for by name."""
    reads_masks: bool = False
    """Whether it takes a mask in any form of `emca_kernels.masks`, not as bool tensor alone."""


class RefusedError(ValueError):
    """The backend that was asked for cannot serve the call; the message holds its reason."""


_BACKENDS: dict[str, list[Backend]] = {}

_served: ContextVar[dict[str, str] | None] = ContextVar("served", default=None)


def register_backend(op: str, backend: Backend) -> None:
    """File a backend of an operator; those filed later are preferred, the reference comes first."""
    _BACKENDS.setdefault(op, []).append(backend)


@contextmanager
def record_backends() -> Iterator[dict[str, str]]:
    """Collects operator -> "backend (reason)" of the calls made inside, for measurements."""
    served: dict[str, str] = {}
    token = _served.set(served)
    try:
        yield served
    finally:
        _served.reset(token)


def choose_backend(op: str, *tensors: Tensor | None, asked: str | None = None) -> tuple[Backend, str]:
    """The backend that serves these tensors and the reason for the choice; noted where `record_backends` listens.

    Args:
        op: name of the operator.
        tensors: the tensors of the call.
        asked: a backend's name; else `EMCA_BACKEND`, else the fastest that can.

    Raises:
        RefusedError: the one asked for cannot serve the call.
        ValueError: unknown operator or unknown backend.
    """
    if torch.compiler.is_compiling():
        # what is traced is the definition in plain torch, for the compiler to fuse; opaque operators choose when they run
        return _BACKENDS[op][0], "traced"
    backend, reason = _choose(op, *tensors, asked=asked)
    served = _served.get()
    if served is not None:
        served[op] = f"{backend.name} ({reason})"
    return backend, reason


def is_traced(asked: str | None) -> bool:
    """Whether a compiler is to see the definition instead of an operator: it is tracing, and the reference was asked for by name."""
    return asked == "reference" and torch.compiler.is_compiling()


def _choose(op: str, *tensors: Tensor | None, asked: str | None) -> tuple[Backend, str]:
    if op not in _BACKENDS:
        raise ValueError(f"unknown operator {op!r}; known: {', '.join(sorted(_BACKENDS))}")
    known = {backend.name: backend for backend in _BACKENDS[op]}
    source = "backend" if asked else "EMCA_BACKEND"
    asked = asked or _asked_by_environment(op)
    if asked is not None:
        if asked not in known:
            raise ValueError(f"{source}={asked!r} is no backend of {op}; known: {', '.join(sorted(known))}")
        refusal = known[asked].refuses(*tensors)
        if refusal:
            raise RefusedError(f"{source}={asked!r} cannot serve this call of {op}: {refusal}")
        return known[asked], f"asked for by {source}"
    refusals: list[str] = []
    for backend in reversed(_BACKENDS[op]):
        # first: what serves only when asked for is not built before
        refusal = backend.refuses_unasked(*tensors) or backend.refuses(*tensors)
        if not refusal:
            return backend, "; ".join(refusals) or ("the only one built in" if len(known) == 1 else "the fastest here")
        refusals.append(f"{backend.name}: {refusal}")
    raise ValueError(f"no backend of {op} serves this call: {'; '.join(refusals)}")


def _asked_by_environment(op: str) -> str | None:
    """The backend that EMCA_BACKEND asks for, if it is one of this operator's or of none at all."""
    wanted = os.environ.get("EMCA_BACKEND")
    if not wanted:
        return None
    entries = [entry.strip() for entry in wanted.split(",") if entry.strip()]
    everywhere = [entry for entry in entries if "=" not in entry]
    alone = dict(entry.split("=", 1) for entry in entries if "=" in entry)
    unknown = [name for name in alone if name not in _BACKENDS]
    if unknown:
        raise ValueError(f"EMCA_BACKEND names the unknown operator {unknown[0]!r}; known: {', '.join(sorted(_BACKENDS))}")
    if op in alone:
        return alone[op]
    for name in everywhere:
        elsewhere = any(backend.name == name for backends in _BACKENDS.values() for backend in backends)
        if not elsewhere or any(backend.name == name for backend in _BACKENDS[op]):
            return name
    return None


def backend_named(op: str, name: str) -> Backend:
    """A backend of an operator, one of `known_backends`, whether or not it can serve anything here."""
    return next(backend for backend in _BACKENDS[op] if backend.name == name)


def known_backends(op: str) -> tuple[str, ...]:
    """Names of the backends of an operator, whether or not they can serve anything here."""
    return tuple(backend.name for backend in _BACKENDS[op])


def explain_backend(op: str, *tensors: Tensor | None) -> tuple[str, str]:
    """(name, reason) of the backend that a call of `op` with these tensors would use."""
    backend, reason = _choose(op, *tensors, asked=None)
    return backend.name, reason


def serves_all(*_: Tensor | None) -> None:
    """A reference refuses nothing."""
