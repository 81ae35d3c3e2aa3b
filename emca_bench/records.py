"""Measurements on disk: one JSON object per line, appended and never rewritten. Standard library only.

A record holds what was measured and nothing derived from it::

    {"schema": 1, "context": "1f0c…", "study": "fps", "key": "9a…", "measure": "latency", "arm": "emca", "params": {…},
     "session": "7c41…", "round": 0, "status": "ok", "reason": null, "values": {…}, "samples": {"latency_ms": […]}, "duration_s": 0.4}
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from emca_bench.errors import UsageError
from emca_bench.specs import SCHEMA, canonical_json

Status = Literal["ok", "failed", "impossible"]
"""failed and impossible (no such device or library, K > P) are tried again on resume; the same impossibility is written once."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measurement of one cell in one round."""

    context: str
    """Identity of machine, versions and source under which it was measured; a report never mixes contexts."""
    study: str
    key: str
    measure: str
    arm: str
    params: Mapping[str, Any]
    round: int
    status: Status
    reason: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    """Scalars and breakdowns; names carry their units."""
    samples: Mapping[str, list[float]] = field(default_factory=dict)
    """Raw repeated measurements; names carry their units."""
    duration_s: float = 0.0
    session: str = ""
    """The call of `run` that measured it, whose rounds are interleaved; empty in older records, which count as one session a context."""
    schema: int = SCHEMA

    @property
    def slot(self) -> tuple[str, str, int]:
        """What a resumed run must not measure twice."""
        return self.context, self.key, self.round


def read_records(path: Path) -> list[Record]:
    """All whole records of a file, in order; a torn last line is passed over.

    Raises:
        UsageError: a broken line that is not the last one, or a record of another schema.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise UsageError(f"{path}, line {number}: not a JSON record; the file was edited or damaged") from None
        if not isinstance(entry, dict) or entry.get("schema") != SCHEMA:
            found = entry.get("schema") if isinstance(entry, dict) else entry
            raise UsageError(f"{path}, line {number}: record schema {found!r}, this version reads {SCHEMA}")
        try:
            records.append(Record(**entry))
        except TypeError as error:
            raise UsageError(f"{path}, line {number}: {error}") from None
    return records


class RecordWriter:
    """Appends records to a file that nobody else writes at the same time; each record is on disk before the next is measured."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None

    def __enter__(self) -> RecordWriter:
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise UsageError(f"{self.path} is being written by another run; wait for it, or choose another folder with --out") from None
        self._repair_tail()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def append(self, record: Record) -> None:
        """Write one record through to the disk."""
        assert self._file is not None, "append outside of the with block"
        self._file.write(canonical_json(asdict(record)).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _repair_tail(self) -> None:
        # a line without its end is a record that was being written when the process died
        assert self._file is not None
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)


def commands_of(entry: Mapping[str, Any]) -> list[str]:
    """The distinct commands that measured a context, in order, from its entry in environment.json; older ones name the last alone."""
    return [command for command in entry.get("commands", [entry.get("command")]) if command]


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file as a whole: readers see the old content or the new, never a part; of several writers the last one counts."""
    data = content.encode() if isinstance(content, str) else content
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
