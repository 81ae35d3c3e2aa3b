"""Energy from counters that stand in for those of processors and GPUs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from emca_bench.measure.energy import find_meter
from emca_bench.measure.latency import sample_latency
from emca_bench.specs import Settings

RANGE = 1_000_000


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    for name, kind, counted in (
        ("intel-rapl:0", "package-0", 100),
        ("intel-rapl:1", "package-1", RANGE - 50),
        ("intel-rapl:0:0", "core", 7),
        ("intel-rapl:2", "psys", 50),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(f"{kind}\n")
        (tmp_path / name / "energy_uj").write_text(f"{counted}\n")
        (tmp_path / name / "max_energy_range_uj").write_text(f"{RANGE}\n")
    return tmp_path


def test_packages_are_summed_up_and_counters_may_start_anew(powercap: Path) -> None:
    meter, why_not = find_meter("cpu", powercap=powercap)
    assert meter is not None
    assert why_not is None

    def call() -> None:
        for name, uj in (("intel-rapl:0", 1000), ("intel-rapl:1", 200), ("intel-rapl:0:0", 500), ("intel-rapl:2", 5000)):
            counter = powercap / name / "energy_uj"
            counter.write_text(str((int(counter.read_text()) + uj) % (RANGE + 1)))

    samples, joules = sample_latency(call, Settings(min_samples=3, max_samples=3), warmups=1, meter=meter)
    assert len(samples) == 3
    assert joules == pytest.approx(3 * 1200e-6)


def test_no_counters_or_none_that_can_be_read_is_said(tmp_path: Path, powercap: Path) -> None:
    assert find_meter("cpu", powercap=tmp_path / "none") == (None, "the system shows no energy counters of its processor packages")
    (powercap / "intel-rapl:1" / "energy_uj").unlink()
    meter, why_not = find_meter("cpu", powercap=powercap)
    assert meter is None
    assert why_not is not None
    assert "cannot be read" in why_not


def test_a_gpu_tells_millijoules(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = iter([0, 1500, 4000])
    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counted),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    meter, _ = find_meter("cuda")
    assert meter is not None
    assert meter.joules(meter.read(), meter.read()) == pytest.approx(2.5)


def test_a_driver_that_does_not_tell_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("not supported")

    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(NVMLError=RuntimeError, nvmlInit=refuse))  # type: ignore[arg-type]
    assert find_meter("cuda") == (None, "the driver does not tell the energy: not supported")
    monkeypatch.setitem(sys.modules, "pynvml", None)  # type: ignore[arg-type]
    meter, why_not = find_meter("cuda")
    assert meter is None
    assert "not installed" in str(why_not)
