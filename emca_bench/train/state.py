"""The state of a training on disk: written as a whole or not at all, read back only by the run that it belongs to."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from emca_bench.errors import UsageError
from emca_bench.records import write_atomically

FORMAT = 1
"""Version of the file; others are not read."""


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; the one before it is still there."""


def save_state(path: Path, state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Write a state: beside its place, through to the disk, then renamed.

    Args:
        path: of the file; its folder is made if need be.
        state: tensors and plain values.
        identity: what must be equal for the state to go on: nested mappings of plain values.

    Raises:
        CheckpointWriteError: the disk is full, or the folder cannot be written; the file is what it was.
    """
    content = io.BytesIO()
    torch.save({"format": FORMAT, "identity": dict(identity), **state}, content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.getvalue())
    except OSError as error:
        last = "the last good one is still there" if path.exists() else "there is none yet"
        said = f"checkpoint {path.name} of step {state.get('step')} cannot be written: {error.strerror}; {last}"
        raise CheckpointWriteError(error.errno, said) from error


def load_state(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state that `save_state` wrote; None where there is no file.

    Raises:
        UsageError: not such a file, a torn one, or one of another configuration: the differences are named.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"checkpoint {path} cannot be read ({reason}); remove it to train from the start") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise UsageError(f"checkpoint {path} has format {found}, this version reads {FORMAT}; remove it to train from the start")
    differences = list(_differences(state["identity"], identity))
    if differences:
        raise UsageError(f"checkpoint {path} is of another configuration: {'; '.join(differences)}. Remove it to train from the start")
    return state


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name in dict.fromkeys((*theirs, *ours)):
        there, here = theirs.get(name), ours.get(name)
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            yield from _differences(there, here, f"{prefix}{name}.")
        elif _plain(there) != _plain(here):
            yield f"{prefix}{name} is {there!r} there and {here!r} here"


def _plain(value: Any) -> Any:
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
