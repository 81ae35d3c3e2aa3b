"""What verbs share: exit codes, the study that the arguments name, and what they may ask for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from emca_bench.errors import UsageError

if TYPE_CHECKING:
    from emca_bench.specs import Cell, Study

OK, FAILED, USAGE, INTERRUPTED, UNREAD = 0, 1, 2, 130, 141
"""Exit codes: done; a cell failed or a check did not hold; input that cannot be used; interrupted; nobody reads what is printed."""

DEFAULT_RUNS = Path("reports/local")


def load(arguments: argparse.Namespace) -> tuple[list[Study], list[Study], Path]:
    """The studies to measure now, the whole studies, and the run folder."""
    from emca_bench.specs import find_study, load_studies

    path = find_study(arguments.study)
    whole = load_studies(path, quick=arguments.quick)
    quick = "-quick" if arguments.quick else ""
    return [study.only(_conditions(arguments)) for study in whole], whole, arguments.out or DEFAULT_RUNS / f"{path.stem}{quick}"


def _conditions(arguments: argparse.Namespace) -> dict[str, str]:
    """What --only asks for."""
    conditions = {}
    for condition in arguments.only:
        name, equals, value = condition.partition("=")
        if not equals:
            raise UsageError(f"--only {condition!r} is not of the form KEY=VALUE")
        conditions[name] = value
    return conditions


def trainings(arguments: argparse.Namespace, part: Sequence[Study]) -> tuple[list[Cell], str]:
    """The cells that train on images and their device, once device and data are known to be there."""
    from emca_bench.environment import check_device
    from emca_bench.measure.accuracy import check_data
    from emca_bench.runner import device_of, on_device

    device = arguments.device or device_of(part)
    check_device(device)
    cells = [cell for study in on_device(part, device) if "accuracy" in study.measures for cell in study.cells()]
    if not cells:
        raise UsageError(f"study {arguments.study!r} trains nothing; expected one with the measure 'accuracy'")
    for cell in {(cell.arm.name, cell.params["dataset"]): cell for cell in cells}.values():
        check_data(cell.params)
    return cells, device


def at_least_one(flag: str, found: int | None) -> None:
    """Refuse a flag's number below 1; none was given where it is None."""
    if found is not None and found < 1:
        raise UsageError(f"{flag} {found}: expected at least 1")
