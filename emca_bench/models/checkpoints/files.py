"""Tensors in files: detectron2's `.pkl`, torch's `.pth`, safetensors, and folders as Hugging Face writes them. Nothing in a file is run."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from emca_bench.errors import UsageError, listing
from emca_bench.models.checkpoints.unpickle import RefusedPickleError, restricted_load

TORCH_SUFFIXES = (".pth", ".pt", ".bin")
SUFFIXES = (".pkl", *TORCH_SUFFIXES, ".safetensors")
STATE_KEYS = ("model", "state_dict", "model_state_dict")
"""Under which training programs keep the weights beside their own state."""
FOLDER_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
AUTHOR = "emca-bench"
"""detectron2 reads a `.pkl` as its own only if it names an author; others it takes for Caffe2's and guesses names."""


class CheckpointError(UsageError):
    """A checkpoint that cannot be read, written, or loaded into the model it was meant for."""


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint under the names that it has, on the CPU.

    Args:
        path: `.pkl` (detectron2), `.pth`, `.pt`, `.bin` (torch), `.safetensors`, or a folder as Hugging Face writes it (whole or sharded).

    Raises:
        CheckpointError: no such file, torn, of another kind, or with anything but tensors in it.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}: no such file or folder")
    if path.suffix == ".pkl":
        stored: Any = _reading(path, _read_pickle)
    elif path.suffix in TORCH_SUFFIXES:
        stored = _reading(path, lambda file: torch.load(file, map_location="cpu", weights_only=True))
    elif path.suffix == ".safetensors":
        stored = _reading(path, load_file)
    elif path.name.endswith(".index.json"):
        stored = _read_shards(path)
    else:
        raise CheckpointError(f"checkpoint {path} has the suffix {path.suffix!r}; expected one of {', '.join(SUFFIXES)} or a folder")
    return _flat(path, stored)


def _read_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        return restricted_load(file)


def _reading(path: Path, read: Callable[[Path], Any]) -> Any:
    """Whatever the readers' libraries raise, in one sentence with the path."""
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from None
    try:
        with warnings.catch_warnings():
            # torch.load of a file that is no archive warns of the old format before it fails
            warnings.simplefilter("ignore")
            return read(path)
    except Exception as error:  # a torn file makes the readers fail in any way
        refused = str(error) if isinstance(error, RefusedPickleError) else _refused_by_torch(error)
        if refused:
            raise CheckpointError(
                f"checkpoint {path} is refused: it holds {refused}. Only tensors and plain containers are read; nothing in the file was run"
            ) from None
        raise CheckpointError(f"checkpoint {path} is torn or no {path.suffix} file: {_first_line(error)}") from None


def _refused_by_torch(error: Exception) -> str | None:
    """What `torch.load(weights_only=True)` found that it may not call."""
    found = re.search(r"(?i:unsupported) (?:global: )?GLOBAL ([\w.]+)", str(error))
    return found.group(1) if found and isinstance(error, pickle.UnpicklingError) else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def _read_folder(folder: Path) -> dict[str, Tensor]:
    for name in FOLDER_FILES:
        if (folder / name).is_file():
            return read_tensors(folder / name)
    raise CheckpointError(f"folder {folder} holds no checkpoint; expected one of {', '.join(FOLDER_FILES)}")


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The files that an index names, which must lie beside it."""
    try:
        places = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of a sharded checkpoint: {_first_line(error)}") from None
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names the shard {shard!r}; expected a file beside it")
        tensors |= read_tensors(index.parent / shard)
    absent = [name for name in places if name not in tensors]
    if absent:
        raise CheckpointError(f"{index} names {len(absent)} tensors that its shards do not hold: {', '.join(absent[:5])}")
    return tensors


def _flat(path: Path, stored: Any) -> dict[str, Tensor]:
    while isinstance(stored, Mapping):
        inner = next((stored[key] for key in STATE_KEYS if isinstance(stored.get(key), Mapping)), None)
        if inner is None:
            break
        stored = inner
    if not isinstance(stored, Mapping) or not stored:
        raise CheckpointError(f"checkpoint {path} holds {type(stored).__name__}; expected a non-empty mapping of names to tensors")
    tensors = {name: _tensor(value) for name, value in stored.items()}
    others = [str(name) for name, tensor in tensors.items() if tensor is None or not isinstance(name, str)]
    if others:
        raise CheckpointError(f"checkpoint {path} holds entries that are no tensors under text names: {listing(others[:5])}")
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.ndarray):
        # a copy in the machine's byte order: what was read is read-only memory of the file's
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), copy=True))
    return None


def write_tensors(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a checkpoint in the format of its suffix, whole or not at all: a temporary file beside it is renamed at the end.

    Args:
        tensors: by name.
        path: `.pkl` (detectron2's layout: arrays below "model" and an author), `.pth`, `.pt`, `.bin` (below "model"), or `.safetensors`
            (flat). An existing file is replaced.

    Raises:
        CheckpointError: another suffix, or a place that cannot be written.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"target {path} has the suffix {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        _write(partial, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path.suffix)
        partial.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else _first_line(error)
        raise CheckpointError(f"cannot write {path}: {reason}; nothing was left there") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _write(path: Path, tensors: dict[str, Tensor], suffix: str) -> None:
    if suffix == ".safetensors":
        # tensors that share memory are refused there
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
        return
    with path.open("xb") as file:
        if suffix == ".pkl":
            arrays = {name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy() for name, tensor in tensors.items()}
            pickle.dump({"model": arrays, "__author__": AUTHOR}, file, protocol=4)
        else:
            torch.save({"model": tensors}, file)
