"""When the Triton backend is there, why not, and that nothing imports Triton before it serves."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from emca_kernels import backends, explain_backend, pool_prototypes, select_prototypes
from emca_kernels.triton import runtime
from emca_kernels.triton.configs import block_of, power_of_two, splits_of


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    runtime.missing.cache_clear()
    yield
    runtime.missing.cache_clear()


def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    without_triton(monkeypatch)
    assert runtime.refuses(torch.zeros(1, 2, 3)) == "triton is not installed"
    for operator in (select_prototypes, pool_prototypes):
        with pytest.raises(ValueError, match=r"backend='triton' cannot serve this call of .*: triton is not installed"):
            operator(torch.zeros(1, 2, 3), torch.zeros(1, 1, 3), backend="triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_there_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert runtime.refuses(torch.zeros(1, 2, 3)) == "no CUDA device"
    name, reason = explain_backend("select_prototypes", torch.zeros(1, 2, 3), torch.zeros(1, 1, 3))
    assert name != "triton"
    assert "triton: no CUDA device" in reason


def test_the_interpreter_serves_when_asked_for_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_interpreter(monkeypatch)
    tensors = torch.zeros(1, 2, 3), torch.zeros(1, 1, 3)
    assert runtime.refuses(*tensors) is None
    for operator in ("select_prototypes", "pool_prototypes"):
        name, reason = explain_backend(operator, *tensors)
        assert name != "triton"
        assert "triton: interpreted kernels serve when asked for" in reason
        backend, reason = backends.choose_backend(operator, *tensors, asked="triton")
        assert (backend.name, reason) == ("triton", "asked for by backend")


def test_what_it_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_interpreter(monkeypatch)
    assert runtime.refuses(torch.zeros(1, 2, 3, dtype=torch.float64)) == "float64"
    assert runtime.refuses(torch.zeros(1, 0, 3)) == "empty tensors"
    assert runtime.refuses(torch.zeros(1, 2, 3, device="meta")) == "meta tensors in Triton's interpreter"


def test_importing_the_operators_and_explaining_the_choice_loads_no_kernels() -> None:
    code = (
        "import sys, torch, emca_kernels; emca_kernels.explain_backend('select_prototypes', torch.zeros(1, 2, 3)); "
        "print([name for name in sys.modules if name.endswith('triton_kernels')])"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"


def test_every_pixel_belongs_to_one_program_and_none_is_idle() -> None:
    for pixels in (1, 63, 64, 65, 4099, 32768):
        for programs in (1, 5, 1000):
            for wanted in (None, 1, 3, 10**6):
                splits, span = splits_of(pixels, 64, programs, 90, wanted)
                assert span % 64 == 0
                assert (splits - 1) * span < pixels <= splits * span


def test_blocks_hold_what_they_must() -> None:
    assert [block_of(count, 128) for count in (1, 16, 17, 64, 65, 130)] == [16, 16, 64, 64, 128, 128]
    assert [block_of(count, 64) for count in (1, 100)] == [16, 64]
    assert [power_of_two(size) for size in (1, 16, 17, 256)] == [16, 16, 32, 256]
