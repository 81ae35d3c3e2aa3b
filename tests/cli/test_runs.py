"""Whole runs through the command line: resume, interrupts, crashes, failures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from emca_bench.errors import UsageError
from emca_bench.records import read_records
from emca_bench.runner import WORKER_LOG, plan
from emca_bench.specs import load_studies
from emca_bench.workers import Worker, Workers


def start(study: Path, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "emca_bench", "run", str(study), "--out", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell's background job ignores interrupts, and so would whatever is started from it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_records(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        path = folder / "records.jsonl"
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError(f"no {count} records in {folder}")


def assert_complete(study: Path, folder: Path) -> None:
    slots = Counter(record.slot[1:] for record in read_records(folder / "records.jsonl"))
    expected = {(task.key, task.round) for loaded in [load_studies(study)] for task in plan(_on_cpu(loaded))}
    assert set(slots) == expected
    assert set(slots.values()) == {1}


def _on_cpu(studies: list) -> list:
    from emca_bench.runner import on_device

    return on_device(studies, "cpu")


def test_a_run_ends_with_a_report_and_a_second_one_measures_nothing(cli, small_study: Path, tmp_path: Path):
    folder = tmp_path / "run"
    first = cli("run", small_study, "--out", folder)
    assert first.returncode == 0, first.stderr
    assert f"report: {folder / 'report.md'}" in first.stdout
    assert (folder / "report.html").stat().st_size > 1000
    assert_complete(small_study, folder)
    measured = [folder / "records.jsonl", folder / "environment.json"]
    before = [path.read_bytes() for path in measured]
    second = cli("run", small_study, "--out", folder)
    assert second.returncode == 0
    assert "measured 0, already there 24" in second.stderr
    # the state of the machine belongs to the measurements, not to a run without any
    assert [path.read_bytes() for path in measured] == before


def test_kill_in_the_middle_loses_and_doubles_nothing(cli, small_study: Path, tmp_path: Path):
    folder = tmp_path / "run"
    process = start(small_study, folder)
    wait_for_records(folder, 7, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = (folder / "records.jsonl").read_bytes()
    # the worst moment: a record half on disk
    (folder / "records.jsonl").write_bytes(before + b'{"arm":"ma')
    resumed = cli("run", small_study, "--out", folder)
    assert resumed.returncode == 0, resumed.stderr
    assert (folder / "records.jsonl").read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert_complete(small_study, folder)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_keeps_records_and_says_how_to_resume(cli, small_study: Path, tmp_path: Path, kind: signal.Signals):
    folder = tmp_path / "run"
    # long enough that it is not over when the signal comes
    small_study.write_text(
        small_study.read_text().replace("min_seconds = 0.0", "min_seconds = 0.1").replace("max_samples = 2", "max_samples = 99999")
    )
    process = start(small_study, folder)
    wait_for_records(folder, 5, process)
    process.send_signal(kind)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"To resume: emca-bench run {small_study} --out {folder}" in errors
    assert "Traceback" not in errors
    assert cli("run", small_study, "--out", folder).returncode == 0
    assert_complete(small_study, folder)


def test_part_of_a_study_completes_the_whole_later(cli, small_study: Path, tmp_path: Path):
    folder = tmp_path / "run"
    assert cli("run", small_study, "--out", folder, "--only", "arm=emca", "--only", "pixels=8x8").returncode == 0
    assert len(read_records(folder / "records.jsonl")) == 6
    assert "not run" in (folder / "report.md").read_text()
    assert cli("run", small_study, "--out", folder).returncode == 0
    assert_complete(small_study, folder)
    # what came first was not interleaved with what came later
    records = read_records(folder / "records.jsonl")
    sessions = {(record.arm, record.params["pixels"]): record.session for record in records}
    assert len({record.session for record in records}) == 2
    assert sessions["emca", "8x8"] != sessions["masked", "8x8"] == sessions["masked", "4x4"]


def test_the_report_is_of_what_was_asked_for_and_names_what_measured_it(cli, small_study: Path, tmp_path: Path):
    """Two threads, one, and two again, which measures nothing."""
    folder = tmp_path / "run"

    def run(threads: int, *more: str) -> str:
        ended = cli("run", small_study, "--out", folder, "--threads", threads, "--only", "pixels=4x4", *more)
        assert ended.returncode == 0, ended.stderr
        return ended.stderr

    def current() -> dict:
        environment = json.loads((folder / "environment.json").read_text())
        return environment["environments"][environment["current"]]

    run(2, "--only", "arm=emca")
    run(2)
    both, started = current()["commands"], current()["state"]
    command = "emca-bench run small --only pixels=4x4"
    assert both == [f"{command} --only arm=emca --threads 2", f"{command} --threads 2"]
    run(1)
    assert current()["identity"]["threads"] == 1
    assert "| threads | 1 |" in (folder / "report.md").read_text()
    assert "measured 0" in run(2)
    assert (current()["identity"]["threads"], current()["commands"], current()["state"]) == (2, both, started)
    report = (folder / "report.md").read_text()
    assert "| threads | 2 |" in report
    assert f"| commands | `{both[0]}`, `{both[1]}` |" in report


def test_failed_and_impossible_cells_are_rows_and_are_tried_again(cli, tmp_path: Path):
    study = tmp_path / "troubled.toml"
    study.write_text(
        """
[study]
name = "troubled"
title = "Troubled"
question = "?"
measures = ["macs"]
[fixed]
scope = "attention"
batch = 1
queries = 10
width = 32
[axes]
arm = ["emca", "many", "broken"]
pixels = ["4x4"]
[arms.many]
attention = "emca"
selection = "topk_mean"
prototypes = 17
[arms.broken]
attention = "emca"
batch = -1
"""
    )
    folder = tmp_path / "run"
    first = cli("run", study, "--out", folder)
    assert first.returncode == 1
    assert "measured 1, already there 0, impossible 1, failed 1" in first.stderr
    status = {record.arm: (record.status, record.reason) for record in read_records(folder / "records.jsonl")}
    assert status["emca"] == ("ok", None)
    assert status["many"] == ("impossible", "K=17 prototypes from P=16 pixels")
    assert status["broken"][0] == "failed"
    report = (folder / "report.md").read_text()
    assert "K=17 prototypes from P=16 pixels" in report
    before = (folder / "environment.json").read_bytes()
    part = cli("run", study, "--out", folder, "--only", "arm=many")
    assert "measured 0, already there 0, impossible 1, failed 0" in part.stderr
    # an answer that is there already is no measurement
    assert (folder / "environment.json").read_bytes() == before
    second = cli("run", study, "--out", folder)
    assert second.returncode == 1
    assert "measured 0, already there 1, impossible 1, failed 1" in second.stderr
    assert sum(record.status == "impossible" for record in read_records(folder / "records.jsonl")) == 1


def test_what_was_missing_is_measured_once_it_is_there(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    study = tmp_path / "rival.toml"
    study.write_text(
        """
[study]
name = "rival"
title = "Rival"
question = "?"
measures = ["latency"]
[settings]
rounds = 1
min_seconds = 0.0
min_samples = 1
[fixed]
scope = "kernel"
op = "ms_deform_attn"
pixels = "8x8"
width = 32
batch = 1
[axes]
arm = ["ms_deform_attn"]
"""
    )
    package, folder = tmp_path / "rivals" / "torch_ms_deform_attn", tmp_path / "run"
    package.mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])]))
    (package / "__init__.py").write_text("raise ImportError('not there')")
    assert "impossible 1" in cli("run", study, "--out", folder).stderr
    (package / "__init__.py").write_text("def ms_deform_attn(value, *rest):\n    return value.clone()\n")
    assert "measured 1" in cli("run", study, "--out", folder).stderr
    assert [record.status for record in read_records(folder / "records.jsonl")] == ["impossible", "ok"]


def request(study: Path) -> dict:
    task = plan(_on_cpu(load_studies(study)))[0]
    settings = asdict(task.study.settings)
    return {"do": "macs", "arm": asdict(task.cell.arm), "params": dict(task.cell.params), "settings": settings}


def test_a_measuring_process_that_dies_costs_one_cell(small_study: Path, tmp_path: Path):
    worker = Worker(tmp_path / WORKER_LOG, threads=1, device="cpu")
    try:
        worker.start(patient=True)
        assert worker._process is not None
        worker._process.kill()
        worker._process.wait()
        lost = worker.ask(request(small_study))
        assert lost["status"] == "failed"
        assert "ended with code -9" in lost["reason"]
        assert worker.ask(request(small_study))["status"] == "ok"
    finally:
        worker.stop()


def test_a_process_that_finds_other_conditions_is_not_used(small_study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As after an edit of the source: the record would name conditions under which it was not measured."""
    with Workers(2, tmp_path / WORKER_LOG, threads=1, device="cpu") as workers:
        workers.start(patient=True)
        assert workers.first.ask(request(small_study))["status"] == "ok"
        monkeypatch.setenv("EMCA_BACKEND", "reference")
        words = "conditions changed under it: EMCA_BACKEND was None and is reference. What was measured before is kept"
        with pytest.raises(UsageError, match=words):
            list(workers.answers([request(small_study)] * 2, at_once=2))
        workers.first.stop()
        with pytest.raises(UsageError, match=words):
            workers.first.ask(request(small_study))


def test_records_hold_no_names_of_this_machine(cli, small_study: Path, tmp_path: Path):
    folder = tmp_path / "run"
    assert cli("run", small_study, "--out", folder, "--only", "pixels=4x4").returncode == 0
    import getpass
    import platform

    for name in ("records.jsonl", "environment.json", "study.lock.json", "report.md", "summary.json"):
        text = (folder / name).read_text()
        assert str(tmp_path) not in text, name
        assert platform.node() not in text or len(platform.node()) < 4, name
        assert f"/{getpass.getuser()}/" not in text, name


def test_compare_of_a_run_with_itself_sees_no_difference(cli, small_study: Path, tmp_path: Path):
    folder = tmp_path / "run"
    assert cli("run", small_study, "--out", folder).returncode == 0
    result = cli("compare", folder, folder)
    assert result.returncode == 0, result.stderr
    assert "faster" not in result.stdout.replace("is faster", "")
    assert "1.00" in result.stdout


def test_plan_shows_what_is_done_and_how_long_the_rest_takes(cli, small_study: Path, tmp_path: Path):
    folder = tmp_path / "run"
    before = cli("plan", small_study, "--out", folder)
    assert "24 measurements, 0 done" in before.stdout
    assert "unknown before the first run" in before.stdout
    assert cli("run", small_study, "--out", folder, "--only", "arm=emca").returncode == 0
    after = cli("plan", small_study, "--out", folder)
    assert "24 measurements, 12 done" in after.stdout
    # what was measured under other conditions would be measured again
    for arguments, variables in ((["--threads", 1000], {}), ([], {"EMCA_BACKEND": "reference"})):
        other = cli("plan", small_study, "--out", folder, *arguments, **variables)
        assert "24 measurements, 0 done" in other.stdout
    assert "threads 0: expected at least 1" in cli("plan", small_study, "--threads", 0).stderr


def test_report_check_tells_a_report_that_was_edited(cli, small_study: Path, tmp_path: Path):
    folder = tmp_path / "run"
    assert cli("run", small_study, "--out", folder, "--only", "pixels=4x4").returncode == 0
    assert cli("report", folder, "--check").returncode == 0
    report = folder / "report.md"
    report.write_text(report.read_text() + "\nEverything is wonderful.\n")
    checked = cli("report", folder, "--check")
    assert checked.returncode == 1
    assert "report.md" in checked.stdout
    assert json.loads((folder / "summary.json").read_text())


PANOPTIC = """
[study]
name = "segments"
title = "Segments"
question = "Does one model give all results?"
measures = ["accuracy"]
baselines = ["masked_fused"]

[fixed]
scope = "end_to_end"
model = "mask2former_tiny"
dataset = "scenes"
task = "panoptic"
object_threshold = 0.1
overlap_threshold = 0.5
image_size = "64x64"
batch = 2
steps = 4
points = 64
train_images = 4
test_images = 2

[axes]
arm = ["masked_fused", "none"]
seed = [0]
"""


def test_a_panoptic_study_ends_with_all_metrics_and_an_overlay(cli, tmp_path: Path):
    study = tmp_path / "segments.toml"
    study.write_text(PANOPTIC)
    ended = cli("run", study, "--out", tmp_path / "run")
    assert ended.returncode == 0, ended.stderr
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| Arm | PQ" in report
    assert "PQ things | PQ stuff | AP | mIoU" in report
    assert (tmp_path / "run" / "figures" / "overlay-scenes-1.png").is_file()
