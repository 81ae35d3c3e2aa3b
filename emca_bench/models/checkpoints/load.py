"""Checkpoints into models: all of it or an error, unless a part was asked for; what came of every tensor is said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from emca_bench.models.checkpoints.files import CheckpointError, read_tensors
from emca_bench.models.checkpoints.names import COUNTERS, IGNORED, Recognised, recognised_file

PARTS = {
    "backbone": "backbone.",
    "pixel decoder": "sem_seg_head.pixel_decoder.",
    "cross-attention": "sem_seg_head.predictor.transformer_cross_attention_layers.",
    "self-attention": "sem_seg_head.predictor.transformer_self_attention_layers.",
    "feed-forward networks": "sem_seg_head.predictor.transformer_ffn_layers.",
    "queries": "sem_seg_head.predictor.query_",
    "class head": "sem_seg_head.predictor.class_embed.",
    "rest of the mask decoder": "",
}
LISTED = 8


@dataclass(frozen=True)
class LoadReport:
    """What came of every tensor of a checkpoint and of a model.

    Attributes:
        source: the file, or what else the tensors came from.
        naming: whose parameter names it had.
        loaded: names of the model's tensors that were taken from it.
        missing: tensors of the model that it does not have: they keep what they had, fresh in a new model.
        unexpected: tensors that the model has no place for.
        misshaped: name, shape found and shape expected of tensors that do not fit; not loaded.
        ignored: tensors that are no weights of a model.
    """

    source: str
    naming: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    ignored: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every tensor of the model was loaded and every weight of the checkpoint used."""
        return not (self.missing or self.unexpected or self.misshaped)

    def __str__(self) -> str:
        fresh = [*self.missing, *(name for name, _, _ in self.misshaped)]
        lines = [
            f"{self.source}: names of {self.naming}; {len(self.loaded)} of {len(self.loaded) + len(fresh)} tensors of the model loaded"
        ]
        loaded, kept = _by_part(self.loaded), _by_part(fresh)
        for part in PARTS:
            if kept.get(part) and loaded.get(part):
                lines.append(
                    f"  {part}: {len(loaded[part])} tensors loaded, {len(kept[part])} not in the checkpoint: they stay as they were"
                )
            elif kept.get(part):
                lines.append(f"  {part}: nothing loaded: it stays as it was")
            elif loaded.get(part):
                lines.append(f"  {part}: loaded")
        lines += [f"  of another shape: {name} {list(found)}, expected {list(expected)}" for name, found, expected in self.misshaped]
        lines += _listed("missing in the checkpoint", self.missing)
        lines += _listed("not used by this model", self.unexpected)
        lines += _listed("no weights, ignored", self.ignored)
        return "\n".join(lines)


def _by_part(names: Iterable[str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name in names:
        part = next(part for part, prefix in PARTS.items() if name.startswith(prefix))
        grouped.setdefault(part, []).append(name)
    return grouped


def _listed(title: str, names: tuple[str, ...]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return [f"  {title} ({len(names)}): {', '.join(names[:LISTED])}{more}"]


def load_checkpoint(model: nn.Module, path: str | Path, *, strict: bool = True) -> LoadReport:
    """Load a checkpoint of any known format and naming into a model.

    A checkpoint of a Mask2Former with masked cross-attention can start a model with another attention by `strict=False`: all but the
    cross-attention itself transfers, and the report says so.

    Args:
        model: as `build_model` makes it, on any device, in any dtype.
        path: `.pkl` (detectron2), `.pth`, `.pt`, `.bin`, `.safetensors`, or a Hugging Face folder. Names of Mask2Former, PEM, Hugging
            Face or a detectron2 backbone alone; see `to_original_names`.
        strict: whether everything must fit. False loads what fits and reports the rest.

    Returns:
        What was loaded, and what was not; print it.

    Raises:
        CheckpointError: the file cannot be read, its names are of no known kind, or, with `strict`, something does not fit. The model is
            as it was then.
    """
    return load_tensors(model, recognised_file(path, read_tensors(path)), source=str(path), strict=strict)


def load_tensors(model: nn.Module, checkpoint: Recognised, *, source: str, strict: bool = True) -> LoadReport:
    """The same from tensors in memory; see `load_checkpoint`."""
    state = model.state_dict()
    report = _compare(state, checkpoint, source)
    if strict and not report.complete:
        raise CheckpointError(f"checkpoint does not fit the model, nothing was loaded; strict=False loads the part that fits\n{report}")
    if not report.loaded:
        raise CheckpointError(f"checkpoint has nothing that fits the model\n{report}")
    with torch.no_grad():
        for name in report.loaded:
            state[name].copy_(checkpoint.tensors[name])
    return report


def _compare(state: Mapping[str, Tensor], checkpoint: Recognised, source: str) -> LoadReport:
    loaded, misshaped = [], []
    for name in state.keys() & checkpoint.tensors.keys():
        found, expected = tuple(checkpoint.tensors[name].shape), tuple(state[name].shape)
        if found == expected:
            loaded.append(name)
        else:
            misshaped.append((name, found, expected))
    absent = sorted(state.keys() - checkpoint.tensors.keys())
    extra = sorted(checkpoint.tensors.keys() - state.keys())
    ignored = [name for name in extra if name.startswith(IGNORED) or name.endswith(COUNTERS)]
    return LoadReport(
        source=source,
        naming=checkpoint.naming,
        loaded=tuple(sorted(loaded)),
        missing=tuple(name for name in absent if not name.endswith(COUNTERS)),
        unexpected=tuple(name for name in extra if name not in set(ignored)),
        misshaped=tuple(sorted(misshaped)),
        ignored=tuple(ignored),
    )
