"""Trainings of a study: killed within a cell and gone on with, trained by several processes and scored by `run`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from emca_bench.records import RecordWriter
from emca_bench.runner import prepare


def record(folder: Path) -> dict:
    [line] = (folder / "records.jsonl").read_text().splitlines()
    return json.loads(line)


def test_processes_train_and_run_scores(tmp_path: Path, cli, tiny_training):
    """Two processes of torchrun; `run` finds the finished training and trains no step."""
    study = tiny_training("emca", steps=4, train_images=8, test_images=2, seed=0, mask_source="features")
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "emca_bench", "train"]
    trained = subprocess.run(
        [*call, str(study), "--out", "run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.count("trained: 1 cell in run. To score: emca-bench run") == 1
    [checkpoint] = (tmp_path / "run" / "checkpoints").iterdir()
    seconds = record_of_state(checkpoint)
    scored = cli("run", study, "--out", "run", OMP_NUM_THREADS="1")
    assert scored.returncode == 0, scored.stderr
    assert record(tmp_path / "run")["values"]["train_seconds"] == seconds
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    again = cli("train", study, "--out", "run", OMP_NUM_THREADS="1")
    assert again.stdout.startswith("trained: 0 cells in run")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def record_of_state(path: Path) -> float:
    import torch

    return float(torch.load(path, weights_only=True)["log"]["seconds"])


def test_what_a_run_with_other_threads_scored_is_not_trained_again(tmp_path: Path, cli, tiny_training):
    study = tiny_training("emca", steps=2, train_images=8, test_images=2, seed=0, mask_source="features")
    # more than there are cores, so that it is not the default anywhere
    assert cli("run", study, "--out", "run", "--threads", (os.cpu_count() or 1) + 1).returncode == 0
    assert cli("train", study, "--out", "run").stdout.startswith("trained: 0 cells in run")
    assert cli("train", study, "--out", "run", EMCA_BACKEND="reference").stdout.startswith("trained: 1 cell in run")


def test_train_waits_for_nobody_and_writes_beside_nobody(tmp_path: Path, cli, tiny_training):
    study = tiny_training("emca", steps=2, train_images=8, test_images=2, seed=0, mask_source="features")
    (tmp_path / "run").mkdir()
    with RecordWriter(tmp_path / "run" / "records.jsonl"):
        refused = cli("train", study, "--out", "run")
    assert refused.returncode == 2
    assert "records.jsonl is being written by another run" in refused.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert cli("train", study, "--out", "run").returncode == 0


def test_a_killed_run_goes_on_within_its_cell(tmp_path: Path, cli, tiny_training):
    """The measuring process dies after a checkpoint; the run says so, and the next one starts from there."""
    study = tiny_training("emca", steps=150, train_images=8, test_images=2, seed=0, mask_source="features")
    call = [sys.executable, "-m", "emca_bench", "run", str(study), "--out", "run", "--threads", "1"]
    environment = {**os.environ, "EMCA_CHECKPOINT_SECONDS": "0.2"}
    running = subprocess.Popen(
        call,
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        # a shell in the background has its children ignore interrupts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    folder = tmp_path / "run" / "checkpoints"
    deadline = time.monotonic() + 120
    while not (folder.is_dir() and any(path.suffix == ".pt" for path in folder.iterdir())):
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=60) == 130
    assert (tmp_path / "run" / "records.jsonl").read_text() == ""
    [state] = folder.glob("*.pt")
    import torch

    step = torch.load(state, weights_only=True)["step"]
    assert 0 < step < 150
    resumed = cli("run", study, "--out", "run", "--threads", "1")
    assert resumed.returncode == 0, resumed.stderr
    assert record(tmp_path / "run")["values"]["resumed_at"] == step


def test_processes_prepare_one_folder_at_the_same_time(tmp_path: Path):
    """As those of a training do: none sees another's trial of writing, and nothing is left of it."""
    with ThreadPoolExecutor(max_workers=8) as threads:
        for trial in range(40):
            folder = tmp_path / str(trial)
            for outcome in [threads.submit(prepare, folder) for _ in range(8)]:
                outcome.result()
            assert not list(folder.iterdir())
