"""Where the queries of trained decoders look, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from emca_bench.report import numbers
from emca_bench.report.accuracy import AccuracyGroup
from emca_bench.report.document import Column, Table, Value
from emca_bench.report.tables import EMPTY, arm

DIAGNOSTICS = {
    "inside_prototypes": ("Prototype in own object", "share of a query's weight on pixels that lies in the object it is matched to"),
    "inside_allowed": ("Allowed pixels in own object", "the same for all pixels that its mask allows: what a blind choice would reach"),
    "distinct_pixels": ("Distinct pixels", "different pixels chosen, over queries and heads"),
    "moved_prototypes": ("Prototype moved", "in another cell of the coarser grid than in the layer before"),
    "lost_segments": ("Object lost", "matched queries that have another object, or none, after the layer"),
    "empty_masks": ("Empty masks", "queries whose mask allows no pixel"),
    "empty_masks_matched": ("Empty, matched", "of the queries that have an object"),
}
"""Recorded shares: head of the column, and what it says on hover."""


def diagnostics_table(group: AccuracyGroup) -> Table | None:
    """What the decoder's layers do on validation images, a row per arm and layer; None where nothing was looked at."""
    columns = [Column("Arm"), Column("Layer", "right"), *(Column(title, "right", note) for title, note in DIAGNOSTICS.values())]
    rows: list[list[Value]] = []
    starts: set[int] = set()
    for entry in group.measured:
        found = [result.values["diagnostics"] for result in entry.finished if result.values.get("diagnostics")]
        if not found:
            continue
        starts.add(len(rows))
        for layer in range(max(map(len, found))):
            shown = [_share([layers[layer].get(name) for layers in found if layer < len(layers)]) for name in DIAGNOSTICS]
            rows.append([arm(entry.name), Value(f"{layer + 1}", sort=layer), *shown])
    images = group.fact("diagnostic_images")
    if not rows:
        return None
    said = f"Means over {numbers.plural(int(images), 'validation image')} and over seeds, in per cent."
    return Table(columns, rows, said, frozenset(starts - {0}))


def _share(values: Sequence[float | None]) -> Value:
    known = [value for value in values if value is not None]
    if not known:
        return EMPTY
    mean = 100 * sum(known) / len(known)
    return Value(f"{mean:.1f}", sort=mean)
