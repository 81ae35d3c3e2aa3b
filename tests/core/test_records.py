from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from emca_bench.errors import UsageError
from emca_bench.records import Record, RecordWriter, read_records, write_atomically


def record(number: int, **changes: object) -> Record:
    fields = {
        "context": "c",
        "study": "s",
        "key": f"k{number}",
        "measure": "macs",
        "arm": "a",
        "params": {"batch": 1},
        "round": 0,
        "status": "ok",
    }
    return Record(**{**fields, **changes})  # type: ignore[arg-type]


def write(path: Path, *records: Record) -> None:
    with RecordWriter(path) as writer:
        for entry in records:
            writer.append(entry)


def test_what_was_written_is_read(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    written = [record(1, samples={"latency_ms": [1.5, 2.25]}), record(2, status="failed", reason="because")]
    write(path, written[0])
    write(path, written[1])
    assert read_records(path) == written


@pytest.mark.parametrize("kept", [1, 20, -2])
def test_torn_last_line_is_passed_over_and_repaired(tmp_path: Path, kept: int):
    path = tmp_path / "records.jsonl"
    write(path, record(1), record(2))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    path.write_bytes(whole[:first] + whole[first:][:kept])
    assert read_records(path) == [record(1)]
    write(path, record(3))
    assert read_records(path) == [record(1), record(3)]


def test_damage_in_the_middle_is_an_error_with_the_line(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    write(path, record(1), record(2), record(3))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-5], lines[2], ""]))
    with pytest.raises(UsageError, match="line 2"):
        read_records(path)


def test_another_schema_is_refused(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    write(path, record(1))
    path.write_text(path.read_text().replace('"schema":1', '"schema":7'))
    with pytest.raises(UsageError, match="schema 7"):
        read_records(path)


OPEN_ELSEWHERE = """
import sys
from pathlib import Path
from emca_bench.errors import UsageError
from emca_bench.records import RecordWriter
try:
    with RecordWriter(Path(sys.argv[1])):
        print("opened")
except UsageError as error:
    print(error)
"""


def test_two_runs_cannot_write_the_same_file(tmp_path: Path):
    path = tmp_path / "records.jsonl"

    def open_elsewhere() -> str:
        return subprocess.run([sys.executable, "-c", OPEN_ELSEWHERE, str(path)], capture_output=True, text=True, check=True).stdout

    with RecordWriter(path) as writer:
        assert "being written by another run" in open_elsewhere()
        writer.append(record(1))
    assert open_elsewhere().strip() == "opened"
    assert read_records(path) == [record(1)]


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "report.md"
    write_atomically(path, "old")

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_records_are_one_json_object_a_line(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    write(path, record(1), record(2))
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["k1", "k2"]
