"""What figures show of numbers that are far from ordinary."""

from __future__ import annotations

from dataclasses import replace

import pytest

from emca_bench.records import Record
from emca_bench.report import figures
from emca_bench.report.build import render
from emca_bench.report.findings import TradeOff
from emca_bench.report.load import load_run
from emca_bench.report.numbers import TIMES
from emca_bench.report.speed import model_groups
from emca_bench.stats import Mean


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
            assert ax.get_ylim()[0] >= len(means), "what the frame says stands below the last row"


@pytest.mark.parametrize(("scores", "drawn"), [([60.0, 50.0], False), ([50.0, 60.0], True)], ids=["one best", "a front"])
def test_a_front_is_named_where_it_is_drawn(scores: list[float], drawn: bool) -> None:
    """An arm that is fastest and best is the whole front: no line, and no word of one."""
    arms = ("emca", "masked")
    entries = [
        TradeOff(arm=arm, latency_ms=Mean(ms, ms - 1, ms + 1, 3), score=Mean(score, score - 1, score + 1, 3))
        for arm, ms, score in zip(arms, (5.0, 10.0), scores, strict=True)
    ]
    with figures.style():
        figure = figures.accuracy_over_latency(entries, figures.looks(arms), cost="ms", metric="mIoU", title="scenes")
    assert bool(figure.legends) == drawn


def test_a_panel_without_the_first_baseline_compares_with_the_next(make_run, synthetic) -> None:
    """As Hugging Face's model, which has no decoder of its own: the numbers are over what is there, and the caption says so."""

    def change(record: Record) -> Record | None:
        return None if record.arm == "masked" and record.params["scope"] == "decoder" else record

    folder = make_run([synthetic.fps_study()], change=change)
    groups = model_groups(load_run(folder))
    with figures.style():
        panels = figures.latency_by_scope(groups, figures.looks(name for group in groups for name in group.arms)).axes
    for ax, group in zip(panels, groups, strict=True):
        expected = "masked_fused" if group.shared["scope"] == "decoder" else "masked"
        ratios = [row.speedups[expected].estimate for row in group.rows if row.latency_ms and row.arm != expected]
        assert [text.get_text() for text in ax.texts if text.get_text() != "speedup"] == [f"{ratio:.2f}{TIMES}" for ratio in ratios]
    said = render(folder, folder).markdown_path.read_text()
    assert "Numbers: speedup over masked (as published), or where it is missing over masked (fused)." in said
