"""Several cells at once: the same records as one after the other, whatever dies in between."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from emca_bench import runner
from emca_bench.cli import main
from emca_bench.errors import UsageError
from emca_bench.records import Record, read_records
from emca_bench.specs import load_studies
from emca_bench.workers import Message, Worker, Workers

TIMES = ("train_seconds", "waiting_seconds", "loader_images_per_second", "cells_at_once", "resumed_at")
"""Values that tell how long something took, or under which circumstances."""


@pytest.fixture
def study(tiny_training: Callable[..., Path]) -> Path:
    fixed = {"steps": 20, "classes": 10, "train_images": 4, "test_images": 2, "mask_source": "features"}
    return tiny_training("emca", "none", axes={"seed": [0, 1]}, measures=("macs", "accuracy"), **fixed)


def found(folder: Path) -> dict[tuple[str, int], Any]:
    """What was measured, by key, without what depends on the clock."""
    records = read_records(folder / "records.jsonl")
    assert all(record.status == "ok" for record in records), [record.reason for record in records]
    assert len({record.slot for record in records}) == len(records)
    return {record.slot: without_times(record) for record in records}


def without_times(record: Record) -> Any:
    values = {name: value for name, value in record.values.items() if name not in TIMES}
    return record.params, values, record.samples


def test_two_at_once_killed_and_resumed_give_the_bits_of_one_after_the_other(cli, study: Path, tmp_path: Path):
    """kill -9 of the run with some cells done and others under way: losses, scores and multiply-adds are the same in the end."""
    words = ["run", str(study), "--threads", "1"]
    call = [sys.executable, "-m", "emca_bench", *words, "--jobs", "2", "--out", str(tmp_path / "killed")]
    environment = {**os.environ, "EMCA_CHECKPOINT_SECONDS": "0"}
    running = subprocess.Popen(call, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    # the first two are done, and those under way have just begun
    until(lambda: len(trained(tmp_path / "killed")) >= 2 and under_way(tmp_path / "killed"), running)
    running.send_signal(signal.SIGKILL)
    running.wait()
    # its children find out when they next report
    time.sleep(1.0)
    # as after a kill between a record and the end of its checkpoint
    (tmp_path / "killed" / "checkpoints" / f"{trained(tmp_path / 'killed')[0].key}.pt").touch()
    for folder, jobs in (("killed", 2), ("whole", 1)):
        ended = cli(*words, "--jobs", jobs, "--out", tmp_path / folder)
        assert ended.returncode == 0, ended.stderr
        assert not list((tmp_path / folder).glob("checkpoints/*"))
    assert found(tmp_path / "killed") == found(tmp_path / "whole")
    assert len(found(tmp_path / "whole")) == 8
    assert {record.values["cells_at_once"] for record in trained(tmp_path / "killed")} == {2}
    assert any(record.values["resumed_at"] > 0 for record in trained(tmp_path / "killed"))


def test_an_interrupt_stops_all_of_them(study: Path, tmp_path: Path, own_processes: Callable[[], list[Path]]):
    study.write_text(study.read_text().replace("steps = 20", "steps = 10000"))
    call = [sys.executable, "-m", "emca_bench", "run", str(study), "--jobs", "2", "--out", str(tmp_path / "run")]
    environment = {**os.environ, "EMCA_CHECKPOINT_SECONDS": "0.1"}
    running = subprocess.Popen(call, env=environment, stderr=subprocess.PIPE, text=True)
    until(lambda: len(checkpoints(tmp_path / "run")) == 2, running)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert re.search(r"To resume: emca-bench run .* --jobs 2", said)
    assert not own_processes()


def until(there: Callable[[], object], running: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 200
    while not there():
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.02)


def trained(folder: Path) -> list[Record]:
    return [record for record in read_records(folder / "records.jsonl") if record.measure == "accuracy"]


def checkpoints(folder: Path) -> list[Path]:
    return list(folder.glob("checkpoints/*.pt"))


def under_way(folder: Path) -> set[str]:
    """Cells with a checkpoint and without a record."""
    return {path.stem for path in checkpoints(folder)} - {record.key for record in trained(folder)}


class Scripted(Worker):
    """A worker that answers from memory; its pipe is there to be waited for."""

    alive: ClassVar[set[int]] = set()
    seen: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, number: int) -> None:
        super().__init__(Path("none"), threads=1, device="cpu")
        self.number = number
        self._read, self._write = os.pipe()
        self._answer: Message = {}

    def send(self, request: Mapping[str, Any]) -> None:
        self.alive.add(self.number)
        self.seen.append((str(request["do"]), len(self.alive)))
        self._answer = {"kind": "result", "name": request["do"]}
        os.write(self._write, b"x")

    def receive(self) -> list[Message]:
        os.read(self._read, 1)
        return [{"kind": "progress"}, self._answer]

    def fileno(self) -> int:
        return self._read

    def stop(self) -> None:
        self.alive.discard(self.number)


@pytest.fixture
def three() -> Iterable[Workers]:
    Scripted.alive.clear()
    Scripted.seen.clear()
    workers = Workers(3, Path("none"), threads=1, device="cpu")
    workers._workers = [Scripted(number) for number in range(3)]
    yield workers
    for worker in workers._workers:
        assert isinstance(worker, Scripted)
        os.close(worker._read)
        os.close(worker._write)


def test_every_request_is_answered_once_and_what_is_timed_has_the_machine_alone(three: Workers):
    for at_once, count in ((3, 7), (1, 4), (3, 2), (2, 0)):
        names = [f"{at_once}-{number}" for number in range(count)]
        got = list(three.answers([{"do": name} for name in names], at_once=at_once))
        results = {number: message["name"] for number, message in got if message["kind"] == "result"}
        assert results == dict(enumerate(names))
        assert len(got) == 3 * count
    # other processes than the one at work, idle ones too, are gone while something is timed
    assert {living for name, living in Scripted.seen if name.startswith("1-")} == {1}
    assert {living for name, living in Scripted.seen if name == "3-6"} == {3}


def test_what_others_finished_is_not_lost_to_a_request_that_is_wrong(three: Workers, monkeypatch: pytest.MonkeyPatch):
    """All three are heard at once, and the first has nothing but a complaint."""

    def complain() -> list[Message]:
        raise UsageError("no such arm")

    monkeypatch.setattr(three.first, "receive", complain)
    results = []
    with pytest.raises(UsageError, match="no such arm"):  # noqa: PT012
        for _, message in three.answers([{"do": name} for name in "abc"], at_once=3):
            results += [message["name"]] if message["kind"] == "result" else []
    assert results == ["b", "c"]


def test_what_is_timed_says_its_threads(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small_study: Path):
    asked: dict[str, Any] = {}

    def interrupted(*_: object, **options: Any) -> None:
        asked.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupted)
    monkeypatch.setattr("emca_bench.runner.default_threads", lambda: 12)
    assert main(["run", str(small_study), "--jobs", "5"]) == 130
    assert "memory and latency come alone, with threads = 2 as all else here; --threads sets another" in capsys.readouterr().err
    assert (asked["jobs"], asked["threads"]) == (5, None)
    assert "--jobs 5" in asked["command"]
    assert main(["run", str(small_study), "--jobs", "5", "--threads", "3"]) == 130
    assert "come alone" not in capsys.readouterr().err
    assert (runner.threads_of_each(5), runner.threads_of_each(13)) == (2, 1)


def test_records_of_another_context_are_counted(small_study: Path):
    tasks = runner.plan(load_studies(small_study))[:6]
    done = {("there", tasks[0].key, tasks[0].round), ("there", tasks[5].key, tasks[5].round), ("here", "another", 0)}
    assert runner.measured_elsewhere(tasks, done) == 2
    assert runner.measured_elsewhere(tasks, set()) == 0


def test_memory_that_runs_out_beside_others_suggests_fewer(small_study: Path):
    task = runner.plan(load_studies(small_study))[0]
    full = {"status": "failed", "reason": "OutOfMemoryError: emca: out of memory at step 1; try batch = 2"}
    assert runner._record(task, full, runner.Origin("here", ""), 4).reason == full["reason"] + "; or fewer cells at once than --jobs 4"
    assert runner._record(task, full, runner.Origin("here", ""), 1).reason == full["reason"]


def test_a_process_that_cannot_start_is_said(tmp_path: Path):
    worker = Worker(tmp_path / "log", threads=1, device="cuda")
    worker._command = [sys.executable, "-c", "raise SystemExit(3)"]
    with pytest.raises(UsageError, match="did not start; its last words are in"):
        worker.start(patient=True)


@pytest.mark.parametrize("patient", [True, False])
def test_memory_is_kept_where_a_process_trains_and_as_the_user_has_it_where_it_is_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, patient: bool
):
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "7")
    worker = Worker(tmp_path / "log", threads=1, device="cpu")
    answer = "{'kind': 'ready', 'identity': {}, 'found': os.environ['MALLOC_MMAP_MAX_']}"
    worker._command = [sys.executable, "-c", f"import json, os; print(json.dumps({answer}))"]
    assert worker.start(patient=patient)["found"] == ("0" if patient else "7")
    worker.stop()
