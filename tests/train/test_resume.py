"""A run that was killed goes on as if nothing had happened, and refuses a state that is not its own."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from emca_bench import records
from emca_bench.data import Sample
from emca_bench.errors import UsageError
from emca_bench.train import Files
from emca_bench.train.state import CheckpointWriteError, load_state, save_state

Run = Callable[..., Any]


def process(script: Path, folder: Path, **changes: Any) -> int:
    folder.mkdir(exist_ok=True)
    call = [sys.executable, str(script), str(folder), json.dumps({"crop": [64, 64], **changes})]
    return subprocess.run(call, timeout=300, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_killed_and_resumed_is_the_same_bit_for_bit(tmp_path: Path, run: Run, scenes: list[Sample], runs_file: Path, seed: int):
    """kill -9 after a random step; the average of the weights and random choices of pixels go on too."""
    kill_at = random.Random(seed).randint(1, 5)
    setting = {"ema": 0.8, "steps": 6, "attention": "emca", "schedule": "poly"}
    whole, log = run(scenes, **setting)
    # a checkpoint is written after on_step, so that the step of the kill is lost and done again
    assert process(runs_file, tmp_path / "killed", **setting, kill_at=kill_at) == -9
    assert not (tmp_path / "killed" / "result.pt").exists()
    assert process(runs_file, tmp_path / "killed", **setting) == 0
    resumed = torch.load(tmp_path / "killed" / "result.pt", weights_only=True)
    assert resumed["resumed_at"] == kill_at - 1
    assert resumed["losses"] == log.losses
    assert resumed["state"].keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed["state"][name]), name


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found below /proc")
def test_loader_processes_do_not_outlive_a_killed_run(tmp_path: Path, runs_file: Path, own_processes: Callable[[], list[Path]]):
    assert process(runs_file, tmp_path / "killed", workers=1, kill_at=2) == -9
    # torch's loader processes look for their parent every five seconds
    deadline = time.monotonic() + 30
    while alive := own_processes():
        assert time.monotonic() < deadline, alive
        time.sleep(0.2)


def test_a_finished_run_is_not_trained_again(tmp_path: Path, run: Run, scenes: list[Sample]):
    files = Files(checkpoint=tmp_path / "state.pt")
    first, log = run(scenes, files=files, steps=2)
    steps: list[int] = []
    again, read = run(scenes, files=files, steps=2, on_step=lambda step, loss: steps.append(step))
    assert steps == []
    assert read.losses == log.losses
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


def test_another_configuration_is_refused_by_name(tmp_path: Path, run: Run, scenes: list[Sample]):
    run(scenes, files=Files(checkpoint=tmp_path / "state.pt", identity={"arm": "emca", "switches": {"heads": 1}}), steps=1)
    other = Files(checkpoint=tmp_path / "state.pt", identity={"arm": "emca", "switches": {"heads": 2}})
    with pytest.raises(UsageError) as caught:
        run(scenes, files=other, steps=1, learning_rate=2e-3)
    message = str(caught.value)
    assert "recipe.learning_rate is 0.001 there and 0.002 here" in message
    assert "switches.heads is 1 there and 2 here" in message
    assert "steps" not in message


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_torn_file_is_named(tmp_path: Path, share: float):
    path = tmp_path / "state.pt"
    save_state(path, {"step": 1, "weights": torch.rand(1000)}, {})
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UsageError, match=r"state\.pt cannot be read .*remove it"):
        load_state(path, {})


def test_a_file_of_another_kind_is_named(tmp_path: Path):
    torch.save([1, 2], tmp_path / "state.pt")
    with pytest.raises(UsageError, match="has format list, this version reads 1"):
        load_state(tmp_path / "state.pt", {})


def test_a_malicious_file_is_not_run(tmp_path: Path):
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"format": 1, "identity": {}, "weights": Evil()}, tmp_path / "state.pt")
    with pytest.raises(UsageError, match="cannot be read"):
        load_state(tmp_path / "state.pt", {})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("fails_at", ["write", "fsync"])
def test_the_last_good_checkpoint_outlives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str):
    path = tmp_path / "state.pt"
    save_state(path, {"step": 1}, {})
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        if fails_at == "fsync":
            patched.setattr(records.os, "fsync", full)
        else:
            patched.setattr(Path, "replace", full)
        with pytest.raises(CheckpointWriteError, match=r"step 2 cannot be written: No space left on device; the last good one is still"):
            save_state(path, {"step": 2}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert load_state(path, {}) is not None


def test_a_full_disk_in_training_leaves_a_state_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, scenes: list[Sample]):
    files = Files(checkpoint=tmp_path / "state.pt", seconds=0.0)
    whole, _ = run(scenes, steps=4)
    calls, original = [0], records.os.fsync

    def filling(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(records.os, "fsync", filling)
        with pytest.raises(CheckpointWriteError):
            run(scenes, files=files, steps=4)
    resumed, log = run(scenes, files=files, steps=4)
    assert log.resumed_at == 2
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
