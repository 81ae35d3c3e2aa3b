"""Profile of the operators with pytest-benchmark: `pytest benchmarks`. Every case is right before it is timed."""

from __future__ import annotations

from typing import Any

import pytest

SIZES, QUICK_SIZES = (256, 1024, 4096, 32768), (256, 4096)
"""Pixels of a feature level."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="two sizes, short timings")
    parser.addoption("--threads", type=int, help="threads of torch, all cores by default")


def pytest_configure(config: pytest.Config) -> None:
    import torch

    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))
    if config.getoption("--quick"):
        config.option.benchmark_min_rounds = 2
        config.option.benchmark_max_time = 0.05
        config.option.benchmark_warmup = False
    config.option.benchmark_columns = ["min", "median", "iqr", "rounds"]
    config.option.benchmark_sort = "name"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "pixels" in metafunc.fixturenames:
        metafunc.parametrize("pixels", QUICK_SIZES if metafunc.config.getoption("--quick") else SIZES, ids=lambda pixels: f"P{pixels}")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What decides a number, and no name of the machine."""
    import torch

    machine_info.pop("node", None)
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
