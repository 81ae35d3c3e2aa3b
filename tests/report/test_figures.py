"""What figures show of numbers that are far from ordinary."""

from __future__ import annotations

from dataclasses import replace

import pytest

from emca_bench.records import Record
from emca_bench.report import figures
from emca_bench.report.load import load_run
from emca_bench.report.speed import model_groups


def disturbed(record: Record) -> Record:
    """Of one arm, every other round is a thousand times as slow."""
    if record.measure != "latency" or record.arm != "none" or record.round % 2:
        return record
    return replace(record, samples={"latency_ms": [1000 * sample for sample in record.samples["latency_ms"]]})


@pytest.mark.parametrize("wide", [False, True])
def test_an_interval_without_end_does_not_hide_the_means(make_run, synthetic, wide: bool) -> None:
    options = {"change": disturbed} if wide else {}
    groups = model_groups(load_run(make_run([synthetic.fps_study()], **options)))
    names = [name for group in groups for name in group.arms]
    with figures.style():
        panels = figures.latency_by_scope(groups, figures.looks(names)).axes
    assert len(panels) == len(groups)
    for ax, group in zip(panels, groups, strict=True):
        means = [row.latency_ms.estimate for row in group.rows if row.latency_ms]
        low, high = ax.get_xlim()
        assert low < min(means) < max(means) < high
        said = [text.get_text() for text in ax.texts if "beyond the frame" in text.get_text()]
        assert len(said) == wide
        if wide:
            assert high <= 2.5 * max(means)
            assert low >= -0.1 * max(means)
