"""Files of every format: whole, torn, of another kind, and places that cannot be written."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from emca_bench.models.checkpoints import CheckpointError, read_tensors, write_tensors

SUFFIXES = [".pkl", ".pth", ".pt", ".bin", ".safetensors"]


def some_tensors() -> dict[str, Tensor]:
    base = torch.randn(4, 6)
    return {
        "a.weight": base,
        "a.view": base.mT[1:],  # shares memory, not contiguous
        "half": torch.randn(3).half(),
        "double": torch.randn(2, 2, dtype=torch.float64),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "flags": torch.rand(5) < 0.5,
    }


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_written_is_read_bit_by_bit(tmp_path: Path, suffix: str) -> None:
    tensors = some_tensors()
    write_tensors(tensors, tmp_path / f"x{suffix}")
    same(read_tensors(tmp_path / f"x{suffix}"), tensors)
    assert [path.name for path in tmp_path.iterdir()] == [f"x{suffix}"]


def test_pkl_has_the_published_layout(tmp_path: Path) -> None:
    """What detectron2's checkpointer asks for: arrays below "model", and an author."""
    write_tensors({"w": torch.ones(2), "b": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "x.pkl")
    stored = pickle.loads((tmp_path / "x.pkl").read_bytes())
    assert stored["__author__"]
    assert isinstance(stored["model"]["w"], np.ndarray)
    # numpy has no bfloat16; float32 holds every value of it
    assert stored["model"]["b"].dtype == np.float32


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
def test_weights_beside_the_state_of_a_training_are_found(tmp_path: Path, key: str) -> None:
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({key: {"w": torch.arange(3)}, "optimizer": optimizer, "iteration": 12}, tmp_path / "x.pth")
    same(read_tensors(tmp_path / "x.pth"), {"w": torch.arange(3)})


def test_folder_of_hugging_face_whole_and_sharded(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3), "b": torch.randn(2)}
    for name, tensor in tensors.items():
        save_file({name: tensor}, tmp_path / f"model-{name}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: f"model-{name}.safetensors" for name in tensors}}))
    same(read_tensors(tmp_path), tensors)
    same(read_tensors(index), tensors)
    save_file({"whole": torch.ones(1)}, tmp_path / "model.safetensors")
    assert set(read_tensors(tmp_path)) == {"whole"}


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ('{"weight_map": {"a": "../secret.safetensors"}}', "names the shard '../secret.safetensors'; expected a file beside it"),
        ('{"weight_map": {"a": "absent.safetensors"}}', "absent.safetensors: no such file"),
        ('{"weight_map": {"lost": "there.safetensors"}}', "names 1 tensors that its shards do not hold: lost"),
        ('{"weight_map": ["a"]}', "is no index of a sharded checkpoint"),
        ('{"weight_map": ', "is no index of a sharded checkpoint"),
        ("{}", "is no index of a sharded checkpoint"),
    ],
)
def test_index_that_cannot_be_used(tmp_path: Path, index: str, words: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "there.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError) as caught:
        read_tensors(tmp_path)
    assert words in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_torn_file_is_named(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"x{suffix}"
    write_tensors({"w": torch.randn(100, 100)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=rf"checkpoint .*x\{suffix} is torn or no \{suffix} file: \S"):
        read_tensors(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_file_of_another_kind_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_text("<!DOCTYPE html><html>404 not found</html>\n" * 40)
    with pytest.raises(CheckpointError, match=r"x\.\w+ is (torn or no|refused)"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ([1, 2], "holds list; expected a non-empty mapping of names to tensors"),
        ({}, "holds dict; expected a non-empty mapping"),
        ({"model": {"w": "text"}}, "holds entries that are no tensors under text names: w"),
        ({"model": {3: np.ones(2)}}, "holds entries that are no tensors under text names: 3"),
    ],
)
def test_pickle_of_something_else(tmp_path: Path, stored: Any, words: str) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(stored))
    with pytest.raises(CheckpointError) as caught:
        read_tensors(tmp_path / "x.pkl")
    assert words in str(caught.value)


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"x")
    for path, words in (
        (tmp_path / "absent.pth", "no such file or folder"),
        (tmp_path, "holds no checkpoint; expected one of model.safetensors"),
        (tmp_path / "x.onnx", "has the suffix '.onnx'; expected one of .pkl"),
    ):
        with pytest.raises(CheckpointError) as caught:
            read_tensors(path)
        assert words in str(caught.value)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_place_that_cannot_be_written(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "absent" / f"x{suffix}", tmp_path / "file" / f"x{suffix}"):
        with pytest.raises(CheckpointError, match=rf"cannot write {path}: .*; nothing was left there"):
            write_tensors({"w": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"target .* has the suffix '.npz'"):
        write_tensors({"w": torch.ones(2)}, tmp_path / "x.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk's end."""
    paths = [tmp_path / f"x{suffix}" for suffix in SUFFIXES]
    for path in paths:
        write_tensors({"w": torch.ones(2)}, path)
    before = [path.read_bytes() for path in paths]
    program = """
import resource, sys, torch
from emca_bench.models.checkpoints import CheckpointError, write_tensors
tensors = {"w": torch.randn(1000, 1000)}
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for path in sys.argv[1:]:
    try:
        write_tensors(tensors, path)
    except CheckpointError as error:
        print(error)
"""
    ended = subprocess.run([sys.executable, "-c", program, *map(str, paths)], capture_output=True, text=True, check=True)
    for path, said in zip(paths, ended.stdout.splitlines(), strict=True):
        assert said.startswith(f"cannot write {path}: ")
    assert [path.read_bytes() for path in paths] == before
    assert sorted(tmp_path.iterdir()) == sorted(paths)
