"""A pickle that wants to run something runs nothing; one of arrays is read exactly."""

from __future__ import annotations

import collections
import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emca_bench.models.checkpoints import CheckpointError, read_tensors


class Runs:
    """Pickles as a call of whatever it is given."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def attack(canary: Path) -> dict[str, Any]:
    nested = np.empty(2, dtype=object)
    nested[:] = [Runs(os.system, f"touch {canary}"), 1]
    return {
        "system": Runs(os.system, f"touch {canary}"),
        "eval": Runs(eval, f"open({str(canary)!r}, 'w').close()"),
        "popen": [Runs(subprocess.check_call, ["touch", str(canary)])],
        "beside weights": {"w": np.ones(3), "x": Runs(os.system, f"touch {canary}")},
        "object array": {"w": nested},
        "getattr": Runs(getattr, "text", "upper"),
        "numpy file": Runs(np.fromfile, str(canary)),
        "torch storage": Runs(torch.load, str(canary)),
        "torch rebuild": {"w": torch.ones(3)},
    }


NAMES = tuple(attack(Path("x")))


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_a_malicious_pickle_runs(tmp_path: Path, name: str, protocol: int) -> None:
    canary, path = tmp_path / "canary", tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": attack(canary)[name], "__author__": "x"}, protocol=protocol))
    with pytest.raises(CheckpointError, match=r"model_final.pkl is refused: it holds .*nothing in the file was run"):
        read_tensors(path)
    assert not canary.exists()


def test_the_attack_is_one(tmp_path: Path) -> None:
    """The same bytes, read without restrictions, do run."""
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(attack(canary)["object array"]))
    assert canary.exists()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_a_malicious_torch_file_is_refused_too(tmp_path: Path, suffix: str) -> None:
    canary, path = tmp_path / "canary", tmp_path / f"model{suffix}"
    torch.save({"model": {"w": torch.ones(2), "x": Runs(os.system, f"touch {canary}")}}, path)
    with pytest.raises(CheckpointError, match=rf"model{suffix} is refused: .*nothing in the file was run"):
        read_tensors(path)
    assert not canary.exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cbuiltins\neval\n(V1\ntR.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"(ios\nsystem\n.",
        b"cnumpy\ndtype\n(Vf4\ntR(I3\nV<\nNNNI-1\nI-1\nI0\ntb.",  # a dtype alone
        b"cnumpy\ndtype\n}(V__call__\nI1\nsb.",  # a state for the stand-in itself
        b"cnumpy\ndtype\n(VO\ntR.",
        b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
        b"ccollections.abc\nMapping.__subclasshook__\n.",
        b"\x80\x02K\x01\x82\x01.",  # an extension code
        b"P12\n.",
    ],
)
def test_hand_made_opcodes_are_refused(tmp_path: Path, opcodes: bytes) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(opcodes)
    with pytest.raises(CheckpointError, match=r"x\.pkl"):
        read_tensors(path)


def test_a_stand_in_for_an_array_checks_its_size(tmp_path: Path) -> None:
    """A shape that the bytes do not fill is no array of uninitialised memory."""

    class Short:
        def __reduce__(self) -> Any:
            function, arguments, state = np.ones(2, dtype=np.float32).__reduce__()
            return function, arguments, (state[0], (1000,), *state[2:])

    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"model": {"w": Short()}}))
    with pytest.raises(CheckpointError, match=r"an array of shape \(1000,\) with 2 values"):
        read_tensors(path)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i1", "i8", "u1", "b1", ">f4", ">i8"])
def test_arrays_are_read_exactly(tmp_path: Path, protocol: int, dtype: str) -> None:
    values = (100 * np.random.default_rng(torch.initial_seed()).standard_normal((3, 4, 2))).astype(dtype)
    arrays = {
        "c": values,
        "fortran": np.asfortranarray(values),
        "scalar": values[0, 0, 0],
        "none": values[:0],
        "point": np.array(values[1, 1, 1]),
    }
    path = tmp_path / "x.pkl"
    path.write_bytes(
        pickle.dumps({"model": collections.OrderedDict(arrays), "__author__": "x", "matching_heuristics": True}, protocol=protocol)
    )
    read = read_tensors(path)
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == torch.from_numpy(np.zeros(1, np.dtype(dtype).newbyteorder("="))).dtype
        assert read[name].shape == array.shape
        assert np.array_equal(read[name].numpy(), array)
