"""Energy of calls where the machine can tell: the processor packages' counters on a CPU, the driver's counter on a GPU.

Both count the whole device, other work and idle power included: use them on a machine that does nothing else.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")


class Meter(Protocol):
    """A counter of energy."""

    def read(self) -> Sequence[int]:
        """The counters now, in their own unit."""

    def joules(self, begin: Sequence[int], end: Sequence[int]) -> float:
        """Energy between two readings in joules."""


class PackageMeter:
    """Intel's and AMD's RAPL counters of whole processor packages, in microjoules; each starts anew beyond its range.

    Args:
        folders: of the packages, as Linux has them below /sys/class/powercap.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._counters = [folder / "energy_uj" for folder in folders]
        self._ranges = [int((folder / "max_energy_range_uj").read_text()) for folder in folders]

    def read(self) -> list[int]:
        """Microjoules of every package."""
        return [int(counter.read_text()) for counter in self._counters]

    def joules(self, begin: Sequence[int], end: Sequence[int]) -> float:
        """Energy of all packages; a counter may have started anew once in between."""
        spans = zip(begin, end, self._ranges, strict=True)
        return 1e-6 * sum(last - first if last >= first else last - first + span + 1 for first, last, span in spans)


class GpuMeter:
    """NVIDIA's counter of a GPU since its driver was loaded, in millijoules.

    Args:
        nvml: the module pynvml, initialised.
        index: of the device.
    """

    def __init__(self, nvml: Any, index: int = 0) -> None:
        self._nvml, self._handle = nvml, nvml.nvmlDeviceGetHandleByIndex(index)

    def read(self) -> list[int]:
        """Millijoules of the GPU."""
        return [int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))]

    def joules(self, begin: Sequence[int], end: Sequence[int]) -> float:
        """Energy of the GPU."""
        return 1e-3 * (end[0] - begin[0])


def find_meter(device: str, *, powercap: Path = POWERCAP) -> tuple[Meter | None, str | None]:
    """The meter of a device ("cpu" or "cuda") that can be read here, or None and why not."""
    return _gpu_meter() if device == "cuda" else _package_meter(powercap)


def _package_meter(powercap: Path) -> tuple[Meter | None, str | None]:
    try:
        # named package-0, on AMD too; others are parts of one, or the platform around all
        folders = sorted(path for path in powercap.glob("*-rapl:*") if (path / "name").read_text().startswith("package"))
        if not folders:
            return None, "the system shows no energy counters of its processor packages"
        meter = PackageMeter(folders)
        meter.read()
    except (OSError, ValueError) as error:
        return None, f"the energy counters of the processor cannot be read: {getattr(error, 'strerror', None) or error}"
    return meter, None


def _gpu_meter() -> tuple[Meter | None, str | None]:
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None, "pynvml is not installed: pip install 'emca-bench[gpu]'"
    try:
        nvml.nvmlInit()
        meter = GpuMeter(nvml)
        meter.read()
    except nvml.NVMLError as error:
        return None, f"the driver does not tell the energy: {error}"
    return meter, None
