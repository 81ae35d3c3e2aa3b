"""Which implementation serves a call, why, and who is told."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from emca_kernels import backends, explain_backend, select_prototypes
from emca_kernels.backends import Backend, record_backends, register_backend, serves_all
from torch import Tensor

OPERATORS = ("attend_prototypes", "deformable_attention", "emca_attention", "pool_prototypes", "select_prototypes")


def answer(features: Tensor, *_: Tensor | None, **__: int) -> tuple[Tensor, Tensor]:
    """What no search would find."""
    return torch.full((1,), -7), torch.full((1,), torch.nan)


def answered(found: tuple[Tensor, Tensor]) -> bool:
    return found[0].tolist() == [-7]


def refuses_float64(features: Tensor, *_: Tensor | None) -> str | None:
    return "float64" if features.dtype == torch.float64 else None


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second backend of select_prototypes that serves all but float64."""
    monkeypatch.setitem(backends._BACKENDS, "select_prototypes", list(backends._BACKENDS["select_prototypes"][:1]))
    register_backend("select_prototypes", Backend("fast", answer, refuses_float64))


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(1, 7, 8).to(dtype), torch.randn(1, 3, 8).to(dtype)


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_has_a_reference_that_refuses_nothing(operator: str) -> None:
    first = backends._BACKENDS[operator][0]
    assert first.name == "reference"
    assert first.refuses(torch.zeros(1, dtype=torch.float64), None) is None
    name, reason = explain_backend(operator, torch.zeros(1), None)
    assert name in {backend.name for backend in backends._BACKENDS[operator]}
    assert reason


@pytest.mark.usefixtures("fast")
def test_the_one_filed_last_is_preferred() -> None:
    assert explain_backend("select_prototypes", *inputs()) == ("fast", "the fastest here")
    assert answered(select_prototypes(*inputs()))


@pytest.mark.usefixtures("fast")
def test_a_refusal_falls_back_to_the_next_and_is_the_reason() -> None:
    assert explain_backend("select_prototypes", *inputs(torch.float64)) == ("reference", "fast: float64")
    indices, _ = select_prototypes(*inputs(torch.float64))
    assert indices.shape == (1, 3, 1, 1)


def test_the_only_backend_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._BACKENDS, "one_of_a_kind", [Backend("reference", answer, serves_all)])
    assert explain_backend("one_of_a_kind") == ("reference", "the only one built in")


@pytest.mark.usefixtures("fast")
def test_the_environment_overrides_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMCA_BACKEND", "reference")
    assert explain_backend("select_prototypes", *inputs()) == ("reference", "asked for by EMCA_BACKEND")
    assert isinstance(select_prototypes(*inputs())[0], Tensor)


@pytest.mark.usefixtures("fast")
def test_the_argument_overrides_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMCA_BACKEND", "reference")
    with record_backends() as served:
        assert answered(select_prototypes(*inputs(), backend="fast"))
    assert served == {"select_prototypes": "fast (asked for by backend)"}


@pytest.mark.usefixtures("fast")
def test_an_empty_environment_variable_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMCA_BACKEND", "")
    assert explain_backend("select_prototypes", *inputs())[0] == "fast"


def test_an_unknown_backend_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMCA_BACKEND", "cudnn")
    with pytest.raises(ValueError, match=r"EMCA_BACKEND='cudnn' is no backend of select_prototypes; known: .*reference"):
        select_prototypes(*inputs())
    with pytest.raises(ValueError, match="EMCA_BACKEND='cudnn'"):
        explain_backend("select_prototypes", *inputs())


@pytest.mark.usefixtures("fast")
def test_asking_for_one_that_cannot_is_an_error_and_no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend='fast' cannot serve this call of select_prototypes: float64"):
        select_prototypes(*inputs(torch.float64), backend="fast")
    monkeypatch.setenv("EMCA_BACKEND", "fast")
    with pytest.raises(ValueError, match="EMCA_BACKEND='fast' cannot serve this call of select_prototypes: float64"):
        select_prototypes(*inputs(torch.float64))


def test_where_all_refuse_every_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    picky = [Backend("one", answer, lambda *_: "no GPU"), Backend("two", answer, lambda *_: "dtype")]
    monkeypatch.setitem(backends._BACKENDS, "picky", picky)
    with pytest.raises(ValueError, match="no backend of picky serves this call: two: dtype; one: no GPU"):
        explain_backend("picky")


def test_an_unknown_operator() -> None:
    with pytest.raises(ValueError, match=r"unknown operator 'select'; known: attend_prototypes, .*select_prototypes"):
        explain_backend("select")


@pytest.mark.usefixtures("fast")
def test_only_calls_inside_are_recorded_and_the_innermost_listens() -> None:
    select_prototypes(*inputs())
    with record_backends() as outer:
        explain_backend("select_prototypes", *inputs())
        assert outer == {}
        with record_backends() as inner:
            select_prototypes(*inputs(torch.float64))
        assert inner == {"select_prototypes": "reference (fast: float64)"}
        assert outer == {}
        select_prototypes(*inputs())
    select_prototypes(*inputs(torch.float64))
    assert outer == {"select_prototypes": "fast (the fastest here)"}


def test_recording_ends_with_an_exception() -> None:
    with pytest.raises(RuntimeError, match="stop"), record_backends() as served:
        raise RuntimeError("stop")
    select_prototypes(*inputs())
    assert served == {}


def test_importing_the_operators_adds_nothing_to_what_torch_imports() -> None:
    code = (
        "import sys, torch.utils.flop_counter; before = set(sys.modules); import emca_kernels; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.split() == ["emca_kernels"]
