"""What a wrong call says: exit code 2, one sentence, no traceback, nothing measured."""

from __future__ import annotations

import errno
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emca_bench import specs
from emca_bench.cli import build_parser, main
from emca_bench.errors import UsageError
from emca_bench.runner import device_of, on_device
from emca_bench.specs import load_studies


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") <= 1 or not printed.err.startswith("Traceback")
    assert printed.err.startswith("emca-bench: ")
    return printed.err


def test_verbs_and_flags_are_frozen():
    parser = build_parser()
    (verbs,) = (action for action in parser._actions if hasattr(action, "choices") and action.choices)
    found = {
        name: sorted(
            option for action in sub._actions for option in action.option_strings if option.startswith("--") and option != "--help"
        )
        for name, sub in verbs.choices.items()
    }
    study = ["--only", "--out", "--quick"]
    assert found == {
        "ls": [],
        "validate": [],
        "plan": sorted([*study, "--device", "--threads"]),
        "run": sorted([*study, "--device", "--jobs", "--threads"]),
        "train": sorted([*study, "--device", "--tensorboard"]),
        "feed": ["--device", "--only", "--processes", "--quick", "--seconds"],
        "report": ["--accuracies", "--check", "--out", "--readme"],
        "compare": [],
        "convert": ["--names"],
        "data": ["--crop", "--layout", "--limit", "--out", "--seed", "--split"],
        "export": ["--attention", "--batch", "--classes", "--out", "--size", "--weights"],
        "env": ["--device"],
    }


def test_accuracies_are_for_a_readme(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert "give --readme too" in complaint(capsys, "report", tmp_path, "--accuracies", tmp_path)


def test_unknown_study(capsys: pytest.CaptureFixture[str]):
    assert "unknown study 'fpz' (did you mean 'fps'?)" in complaint(capsys, "run", "fpz")


def test_wrong_key_in_a_study(capsys: pytest.CaptureFixture[str], small_study: Path, tmp_path: Path):
    small_study.write_text(small_study.read_text().replace("queries = 10", "querys = 10"))
    message = complaint(capsys, "run", small_study, "--out", tmp_path / "run")
    assert "small.toml: unknown parameter 'querys' (did you mean 'queries'?)" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('arm = ["masked", "emca"]', 'arm = ["masked", "emac"]', "unknown attention 'emac' (did you mean 'emca'?)"),
        ('[axes]\narm = ["masked", "emca"]', '[arms.emca]\nresidual = "row"\n[axes]\narm = ["masked", "emca"]', "did you mean 'raw'"),
    ],
    ids=["attention", "switch"],
)
def test_wrong_names_are_found_before_measuring(
    capsys: pytest.CaptureFixture[str], small_study: Path, tmp_path: Path, old: str, new: str, words: str
):
    small_study.write_text(small_study.read_text().replace(old, new))
    assert words in complaint(capsys, "run", small_study, "--out", tmp_path / "run")
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == b""


def test_folder_that_cannot_be_written_is_found_before_measuring(capsys: pytest.CaptureFixture[str], small_study: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    message = complaint(capsys, "run", small_study, "--out", tmp_path / "file" / "run")
    assert f"output folder {tmp_path / 'file' / 'run'} cannot be written" in message


def test_missing_gpu(capsys: pytest.CaptureFixture[str], small_study: Path, tmp_path: Path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "finds no CUDA device" in complaint(capsys, "run", small_study, "--out", tmp_path / "run", "--device", "cuda")


@pytest.mark.parametrize("verb", ["run", "train", "feed"])
def test_a_study_of_a_gpu_does_not_run_on_a_cpu_unasked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str, tiny_training: Callable[..., Path]
):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    study = tiny_training("none", batch=1, steps=1, seed=0, device="cuda")
    folder = [] if verb == "feed" else ["--out", tmp_path / "run"]
    assert "finds no CUDA device; expected --device cpu here" in complaint(capsys, verb, study, *folder)
    assert not (tmp_path / "run" / "records.jsonl").exists() or not (tmp_path / "run" / "records.jsonl").read_bytes()


def test_device_is_what_the_study_says_or_the_flag(small_study: Path):
    [study] = load_studies(small_study)
    assert device_of([study]) == "cpu"
    on_gpu = replace(study, fixed={**study.fixed, "device": "cuda"})
    # counts, which name no device, go along
    assert device_of([on_gpu, study]) == "cuda"
    assert {cell.params["device"] for cell in on_device([on_gpu], "cpu")[0].cells()} == {"cpu"}
    for several in ([on_gpu, *on_device([study], "cpu")], [replace(study, axes={**study.axes, "device": ("cpu", "cuda")})]):
        with pytest.raises(UsageError, match="name the devices cpu, cuda; a run has one: choose it with --device"):
            device_of(several)


def test_missing_data_set(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("EMCA_DATASETS", raising=False)
    message = complaint(capsys, "run", "camvid", "--quick", "--out", tmp_path / "run")
    assert "EMCA_DATASETS" in message
    monkeypatch.setenv("EMCA_DATASETS", str(tmp_path))
    message = complaint(capsys, "run", "camvid", "--quick", "--out", tmp_path / "run")
    assert str(tmp_path / "camvid") in message


def camvid_tree(root: Path) -> Path:
    for split in ("train", "val", "test"):
        for kind, suffix, pixels in (
            ("images", "jpg", np.zeros((40, 60, 3), np.uint8)),
            ("annotations", "png", np.ones((40, 60), np.uint8)),
        ):
            folder = root / "camvid" / kind / split
            folder.mkdir(parents=True)
            Image.fromarray(pixels).save(folder / f"{split}.{suffix}")
    return root / "camvid"


def break_image(tree: Path) -> None:
    path = tree / "images" / "test" / "test.jpg"
    path.write_bytes(path.read_bytes()[:200])


def break_label_size(tree: Path) -> None:
    Image.fromarray(np.zeros((40, 50), np.uint8)).save(tree / "annotations" / "test" / "test.png")


def break_label_class(tree: Path) -> None:
    Image.fromarray(np.full((40, 60), 77, np.uint8)).save(tree / "annotations" / "test" / "test.png")


@pytest.mark.parametrize(
    ("break_it", "words"),
    [(break_image, ["test.jpg"]), (break_label_size, ["'test'", "40x50", "40x60"]), (break_label_class, ["test.png", "77"])],
)
def test_broken_real_images_are_named(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    break_it: Callable[[Path], None],
    words: list[str],
    tiny_training: Callable[..., Path],
):
    break_it(camvid_tree(tmp_path))
    monkeypatch.setenv("EMCA_DATASETS", str(tmp_path))
    study = tiny_training("none", dataset="camvid", batch=1, steps=1, seed=0)
    assert main(["run", str(study), "--out", str(tmp_path / "run")]) == 2
    complained = capsys.readouterr().err.splitlines()[-1]
    assert complained.startswith("emca-bench: ")
    assert all(word in complained for word in words), complained


def test_full_disk_is_one_sentence(capsys: pytest.CaptureFixture[str], small_study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "records.jsonl")

    monkeypatch.setattr("emca_bench.runner.RecordWriter.append", full)
    assert main(["run", str(small_study), "--out", str(tmp_path / "run")]) == 2
    assert "cannot write records.jsonl: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "arm"], "KEY=VALUE"),
        (["--only", "arm=emac"], "did you mean 'emca'"),
        (["--threads", "0"], "--threads 0"),
        (["--jobs", "0"], "--jobs 0"),
    ],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], small_study: Path, arguments: list[str], words: str):
    assert words in complaint(capsys, "run", small_study, *arguments)


@pytest.mark.parametrize("verb", [["report"], ["compare", "."]])
def test_folder_that_is_no_run(capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: list[str]):
    assert "is no run folder" in complaint(capsys, *verb, tmp_path)


def test_validate_and_ls_name_everything(capsys: pytest.CaptureFixture[str], small_study: Path):
    assert main(["validate", str(small_study)]) == 0
    assert "small: 4 cells, macs, latency, memory" in capsys.readouterr().out
    assert main(["ls"]) == 0
    listed = capsys.readouterr().out
    for name in ("attention", "reproduce", "emca_soft", "pem_ca", "mask2former_r50", "scenes", "camvid", "mask_source"):
        assert f"  {name} " in listed


@pytest.mark.parametrize(
    "statement", ["import emca_bench", "import emca_bench.cli; emca_bench.cli.build_parser()", "import emca_bench.report.build"]
)
def test_light_parts_do_not_import_torch(statement: str):
    check = f"{statement}\nimport sys\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_a_reader_that_has_seen_enough_gets_no_traceback():
    call = [sys.executable, "-m", "emca_bench", "plan", "kernels"]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as planning:
        assert planning.stdout is not None
        assert planning.stderr is not None
        planning.stdout.close()
        assert "Traceback" not in planning.stderr.read()
    assert planning.returncode == 141


def test_without_standard_output_nothing_breaks():
    call = f"exec {shlex.quote(sys.executable)} -m emca_bench plan kernels >&-"
    ended = subprocess.run(["sh", "-c", call], stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, "Traceback" in ended.stderr) == (0, False)


def test_a_pipe_that_breaks_elsewhere_is_not_hidden(monkeypatch: pytest.MonkeyPatch):
    def broken(path: Path) -> Path:
        raise BrokenPipeError(errno.EPIPE, "a process died")

    monkeypatch.setattr(specs, "find_study", broken)
    with pytest.raises(BrokenPipeError, match="a process died"):
        main(["plan", "kernels"])


@pytest.mark.parametrize("arguments", [["-c", "import emca_bench"], ["-m", "emca_bench", "--help"]], ids=["import", "help"])
def test_starts_within_three_tenths_of_a_second(arguments: list[str]):
    def seconds() -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started

    assert min(seconds() for _ in range(5)) < 0.3


def test_a_study_without_training_cannot_be_trained(capsys: pytest.CaptureFixture[str], small_study: Path, tmp_path: Path):
    assert "trains nothing; expected one with the measure 'accuracy'" in complaint(capsys, "train", small_study, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrong", ["two", "1,,2", "-1", ""])
def test_numbers_of_loader_processes(capsys: pytest.CaptureFixture[str], wrong: str):
    assert f"--processes {wrong!r}: expected numbers" in complaint(capsys, "feed", "accuracy", f"--processes={wrong}")


def test_diagnostics_need_a_validation_split(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_training: Callable[..., Path]
):
    tree = camvid_tree(tmp_path)
    for kind in ("images", "annotations"):
        (tree / kind / "val").rename(tree / kind / "away")
    monkeypatch.setenv("EMCA_DATASETS", str(tmp_path))
    study = tiny_training("none", dataset="camvid", batch=1, steps=1, seed=0, diagnostic_images=2)
    assert "no images of camvid val" in complaint(capsys, "train", study, "--out", tmp_path / "run")
