"""Accuracy beside cost, the front, and the arm that the rule recommends."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from emca_bench.records import Record
from emca_bench.report.accuracy import accuracy_groups
from emca_bench.report.build import render
from emca_bench.report.costs import cost_table, costs, pareto_arms, recommend
from emca_bench.report.findings import findings
from emca_bench.report.load import load_run
from emca_bench.specs import Settings, Study, canonical_json, dump_lock

SCORES = {"masked": 60.0, "emca": 57.0, "emca_soft": 60.1, "mask_pooling": 59.9, "emca_rawres": 58.0, "none": 50.0}
MS = {"masked": 10.0, "emca": 4.0, "emca_soft": 6.0, "mask_pooling": 5.0, "emca_rawres": 4.0, "none": 3.0}
DIAGNOSTICS = [
    {"empty_masks": 0.5, "empty_masks_matched": 0.25, "inside_allowed": 0.4, "inside_prototypes": 0.625, "lost_segments": 0.1},
    {"empty_masks": 0.5, "empty_masks_matched": None, "inside_allowed": 0.4, "inside_prototypes": 0.5, "lost_segments": 0.1},
]


def studies(synthetic: Any) -> list[Study]:
    accuracy = replace(synthetic.accuracy_study(), axes={"dataset": ("scenes",), "seed": (0, 1, 2)})
    kept = {name: value for name, value in accuracy.fixed.items() if name not in ("steps", "train_images", "test_images")}
    cost = replace(
        accuracy,
        name="accuracy-cost",
        measures=("macs", "latency", "memory"),
        axes={},
        fixed={**kept, "scope": "end_to_end", "batch": 1},
        settings=Settings(rounds=5),
        expected=(),
    )
    return [accuracy, cost]


def with_numbers(scores: dict[str, float], ms: dict[str, float]) -> Callable[[Record], Record]:
    def change(record: Record) -> Record:
        if record.measure == "accuracy":
            wobble = 0.02 * int(record.params["seed"])
            values = {**record.values, "miou": scores[record.arm] + wobble, "diagnostics": DIAGNOSTICS, "diagnostic_images": 8}
            values |= {"waiting_seconds": 7.0, "train_seconds": 707.0, "loader_images_per_second": 123.0}
            return replace(record, values=values)
        if record.measure == "latency":
            return replace(record, samples={"latency_ms": [ms[record.arm] * (1 + 0.001 * record.round)] * 3})
        return record

    return change


@pytest.fixture
def group_of(make_run, synthetic):
    def make(scores: dict[str, float] = SCORES, ms: dict[str, float] = MS, part: slice = slice(None)):
        folder = make_run(studies(synthetic)[part], change=with_numbers({**SCORES, **scores}, {**MS, **ms}))
        run = load_run(folder)
        [group] = accuracy_groups(run)
        return group, costs(findings(run).models, group), folder

    return make


@pytest.mark.parametrize("changed", ["data", "train_data"])
def test_nothing_is_compared_where_the_images_changed(make_run, synthetic, changed: str):
    """The last seed of one arm was trained or tested on other files; its row is shown, no verdict is."""
    study = studies(synthetic)[0]
    scored = with_numbers(SCORES, MS)

    def change(record: Record) -> Record:
        version = "old" if record.arm == "emca" and record.params["seed"] == 2 else "new"
        return replace(scored(record), values={**scored(record).values, "data": "same", "train_data": "same", changed: version})

    folder = make_run([study], change=change)
    [group] = accuracy_groups(load_run(folder))
    assert group.sensitivity is None
    assert [entry.verdict for entry in group.arms] == [None] * len(group.arms)
    assert len(group.measured) == len(group.arms)
    assert recommend(group, {}).arm is None
    assert "The files of scenes changed between the cells of this comparison" in render(folder, folder).markdown_path.read_text()


def test_every_arm_stands_beside_its_own_cost(group_of):
    group, rows, _ = group_of()
    assert set(rows) == set(SCORES)
    table = cost_table(group, rows)
    assert table is not None
    shown = {str(row[0].sort): row for row in table.rows}
    assert shown["emca"][1].sort == pytest.approx(57.02)
    assert shown["emca"][3].sort == pytest.approx(4.0, rel=0.01)
    assert shown["masked"][3].sort == pytest.approx(10.0, rel=0.01)
    assert shown["emca"][2].sort == rows["emca"].macs
    assert [name for name in shown if shown[name][5].text == "yes"] == ["emca_soft", "emca_rawres", "mask_pooling", "none"]


def test_the_front_holds_what_nothing_beats(group_of):
    group, rows, _ = group_of()
    assert pareto_arms(group, rows) == ["none", "emca_rawres", "mask_pooling", "emca_soft"]


def test_the_rule_takes_the_fastest_that_is_not_worse(group_of):
    group, rows, _ = group_of()
    chosen = recommend(group, rows)
    assert chosen.arm == "mask_pooling"
    assert "not worse than masked by the margin" in chosen.reason


def test_among_equally_fast_arms_the_most_accurate(group_of):
    group, rows, _ = group_of(ms={"emca_soft": 5.05, "mask_pooling": 5.0})
    assert recommend(group, rows).arm == "emca_soft"


@pytest.mark.parametrize(
    ("scores", "ms", "words"),
    [
        ({"none": 59.9}, {}, "refuted"),
        (dict.fromkeys(("emca", "emca_soft", "mask_pooling", "emca_rawres"), 57.0), {}, "no arm is shown to lose less than 0.5 mIoU"),
        ({}, {"emca_soft": 11.0, "mask_pooling": 9.9}, "no arm that is not worse is faster than the baseline"),
    ],
    ids=["blind data", "all worse", "none faster"],
)
def test_otherwise_nothing_is_recommended(group_of, scores: dict[str, float], ms: dict[str, float], words: str):
    group, rows, _ = group_of(scores, ms)
    chosen = recommend(group, rows)
    assert chosen.arm is None
    assert words in chosen.reason


def test_without_costs_there_is_no_table_and_no_recommendation(group_of):
    group, rows, _ = group_of(part=slice(0, 1))
    assert rows == {}
    assert cost_table(group, rows) is None
    assert recommend(group, rows).arm is None


def test_the_report_says_it_all(group_of, tmp_path: Path):
    *_, folder = group_of()
    text = render(folder, tmp_path / "out").markdown_path.read_text()
    words = ("can tell cross-attentions apart", "| Arm | mIoU ± 95 % | Seeds |", "Recommended: `mask_pooling`")
    order = [text.index(word) for word in words]
    assert order == sorted(order)
    [entry] = json.loads((tmp_path / "out" / "summary.json").read_text())["accuracy"]
    assert entry["recommended"]["arm"] == "mask_pooling"
    assert entry["pareto_front"] == ["none", "emca_rawres", "mask_pooling", "emca_soft"]
    assert "Rule, stated before the run" in text
    assert "| `emca` | 1 | 62.5 | 40.0 | — | — | 10.0 | 50.0 | 25.0 |" in text
    assert "| `emca` | 2 | 50.0 | 40.0 | — | — | 10.0 | 50.0 | — |" in text
    assert "Means over 8 validation images and over seeds, in per cent." in text
    assert "| Trains images/s | Loader images/s | Waiting for data |" in text
    # 800 steps of 8 images in 700 s of work
    assert "| 9.14 | 123 | 1.0% |" in text
    assert "emca-bench run accuracy --only arm=emca`" in text


@pytest.mark.parametrize("count", [1, 8])
def test_times_of_cells_that_shared_a_machine_say_so(make_run, synthetic, tmp_path: Path, count: int):
    def at_once(record: Record) -> Record:
        return replace(with_numbers(SCORES, MS)(record), values={**record.values, "cells_at_once": count})

    folder = make_run(studies(synthetic)[:1], change=at_once)
    text = render(folder, tmp_path / "out").markdown_path.read_text()
    assert ("| At once |" in text) == (count > 1)


def test_mechanisms_are_a_table(make_run, synthetic, tmp_path: Path):
    study = Study(
        name="mechanism",
        title="Mechanism",
        question="Which attention learns what?",
        measures=("mechanism",),
        baselines=("masked",),
        arms=synthetic.arms("masked", "emca"),
        axes={"need": ("one", "mean", "modes"), "seed": (0, 1)},
        fixed={"scope": "attention", "pixels": "8x8", "queries": 8, "width": 32, "batch": 16, "steps": 400},
        settings=Settings(),
    )
    folder = make_run([], artifacts=False)
    records = [
        Record(
            context=synthetic.CONTEXT,
            study="mechanism",
            key=cell.key("mechanism"),
            measure="mechanism",
            arm=cell.arm.name,
            params=dict(cell.params),
            round=0,
            status="ok",
            values={"explained": 90.0 + int(cell.params["seed"])},
            samples={},
            duration_s=1.0,
        )
        for cell in study.cells()
        if (cell.arm.name, cell.params["need"]) != ("emca", "modes")
    ]
    (folder / "study.lock.json").write_text(dump_lock([study]))
    (folder / "records.jsonl").write_text("".join(canonical_json(asdict(record)) + "\n" for record in records))
    text = render(folder, tmp_path / "out").markdown_path.read_text()
    assert "## Mechanism" in text
    assert "| `masked` | 90.50 ± 6.35 | 90.50 ± 6.35 | 90.50 ± 6.35 |" in text
    assert row_of(text, "emca").endswith("| not run |")


def row_of(text: str, arm: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"| `{arm}` |"))
