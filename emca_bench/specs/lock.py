"""Resolved studies in the lock file of a run folder: what was planned, whatever becomes of the TOML files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from emca_bench.errors import UsageError
from emca_bench.specs.study import SCHEMA, Arm, Expected, Settings, Study, Target


def dump_lock(studies: Iterable[Study]) -> str:
    """Resolved studies as JSON, for the lock file of a run folder: what was planned, whatever becomes of the TOML files."""
    return json.dumps({"schema": SCHEMA, "studies": [_plain(study) for study in studies]}, indent=1) + "\n"


def load_lock(path: Path) -> list[Study]:
    """The studies that `dump_lock` wrote.

    Raises:
        UsageError: no such file, not JSON, or written by another schema.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UsageError(f"{path.parent} is no run folder: {path.name} is not there") from None
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    if data.get("schema") != SCHEMA:
        raise UsageError(f"{path} has schema {data.get('schema')}, this version reads {SCHEMA}")
    return [_study_from(entry) for entry in data["studies"]]


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value


def _study_from(entry: dict[str, Any]) -> Study:
    # a lock file from before there were targets has none
    targets = (Target(**{**target, "against": tuple(target["against"])}) for target in entry.get("targets", ()))
    return Study(
        **{
            **entry,
            "targets": tuple(targets),
            "measures": tuple(entry["measures"]),
            "baselines": tuple(entry["baselines"]),
            "arms": tuple(Arm(**arm) for arm in entry["arms"]),
            "axes": {name: tuple(values) for name, values in entry["axes"].items()},
            "settings": Settings(**entry["settings"]),
            "expected": tuple(Expected(**{**claim, "against": tuple(claim["against"])}) for claim in entry["expected"]),
        }
    )
