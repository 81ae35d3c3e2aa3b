"""Multiply-adds by component, and the speedup they bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emca_bench import stats
from emca_bench.report.load import ResultStatus, Run, point
from emca_bench.specs import MODEL_SCOPES, Cell, Study

COMPONENTS = ("backbone", "pixel_decoder", "input_projection", "cross_attention", "self_attention", "ffn", "mask_heads", "other")
"""In the order in which an image passes through them."""


@dataclass(frozen=True, kw_only=True)
class ByFvcore:
    """The same call by the rules of fvcore, the counter of most papers."""

    macs: int
    added: Mapping[str, int]
    """Multiply-adds that fvcore sees and torch's counter does not, by operator."""
    dropped: Mapping[str, int]
    """The other way round."""


@dataclass(frozen=True, kw_only=True)
class CountRow:
    """Multiply-adds of one forward pass of one arm; `macs` is None where they were not counted."""

    study: Study
    cell: Cell
    status: ResultStatus
    reason: str
    macs: int | None
    closed_form_macs: int | None
    """Of all cross-attentions, from their formulas."""
    components: Mapping[str, int]
    parameters: int | None
    uncounted: Mapping[str, int]
    by_fvcore: ByFvcore | None
    """None where the run did not record it."""

    @property
    def arm(self) -> str:
        """Name of the arm."""
        return self.cell.arm.name

    @property
    def attention_macs(self) -> int | None:
        """Multiply-adds of the cross-attentions as counted; of the whole call where nothing else is in it."""
        return self.components.get("cross_attention", 0) if self.components else self.macs

    @property
    def disagreement(self) -> float | None:
        """Counted cross-attentions over their closed form, minus one."""
        return self.attention_macs / self.closed_form_macs - 1 if self.attention_macs is not None and self.closed_form_macs else None

    @property
    def attention_share(self) -> float | None:
        """Share of the cross-attentions in all multiply-adds."""
        return (self.attention_macs or 0) / self.macs if self.macs and self.components else None

    @property
    def bound(self) -> float | None:
        """How many times fewer multiply-adds if the cross-attention were free."""
        share = self.attention_share
        return None if share is None else stats.amdahl_bound(share)


def model_counts(run: Run) -> list[list[CountRow]]:
    """Counts of decoders and models: one list per point of the axes; a point that two studies count appears once."""
    groups: dict[object, dict[str, CountRow]] = {}
    for study, cells in run.planned("macs", MODEL_SCOPES):
        for cell in cells:
            shown = tuple(pair for pair in point(study, cell) if pair[0] not in ("dtype", "device", "seed"))
            names = ("scope", "model", "image_size", "batch", "classes", "queries", "layers")
            where = (*((name, cell.params.get(name)) for name in names if name not in cell.arm.overrides), shown)
            group = groups.setdefault(where, {})
            row = _row(run, study, cell)
            if cell.arm.name not in group or (group[cell.arm.name].macs is None and row.macs is not None):
                group[cell.arm.name] = row
    return [list(group.values()) for group in groups.values()]


def attention_counts(run: Run) -> list[CountRow]:
    """Counts of single cross-attention calls."""
    return [_row(run, study, cell) for study, cells in run.planned("macs", ("attention",)) for cell in cells]


def components_of(rows: Sequence[CountRow]) -> list[str]:
    """Components that occur, known ones in order."""
    found = dict.fromkeys(name for row in rows for name in row.components)
    return [name for name in COMPONENTS if name in found] + [name for name in found if name not in COMPONENTS]


def component_label(name: str) -> str:
    """A component of the model, as figures and tables print it."""
    return "FFN" if name == "ffn" else name.replace("cross_", "cross-").replace("self_", "self-").replace("_", " ")


def _row(run: Run, study: Study, cell: Cell) -> CountRow:
    result = run.find(cell, "macs")
    assert result is not None, "every planned count has a result"
    values = result.values
    return CountRow(
        study=study,
        cell=cell,
        status=result.status,
        reason=result.reason,
        macs=values.get("macs"),
        closed_form_macs=values.get("closed_form_macs"),
        components=values.get("components") or {},
        parameters=values.get("parameters"),
        uncounted=values.get("uncounted") or {},
        by_fvcore=by_fvcore(values),
    )


def by_fvcore(values: Mapping[str, Any]) -> ByFvcore | None:
    """What a record of the measure `macs` holds of fvcore, if it does."""
    found = values.get("fvcore")
    return ByFvcore(macs=found["macs"], added=found["added"], dropped=found["dropped"]) if found else None
