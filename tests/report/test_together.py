"""All arms against the baseline at once: who is in it, what is said, and where there is nothing to say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from emca_bench.records import Record
from emca_bench.report import figures
from emca_bench.report.accuracy import AccuracyGroup, accuracy_groups
from emca_bench.report.build import render
from emca_bench.report.load import load_run
from emca_bench.report.together import together_blocks, together_table
from emca_bench.specs import Study
from emca_bench.stats import Joint


def study_of(synthetic: SimpleNamespace, *arms: str, seeds: int = 4) -> Study:
    axes = {"dataset": ("scenes",), "seed": tuple(range(seeds))}
    return replace(synthetic.accuracy_study(), arms=synthetic.arms(*arms), axes=axes, expected=())


def group_of(folder: Path) -> AccuracyGroup:
    (group,) = accuracy_groups(load_run(folder))
    return group


def blocks_of(group: AccuracyGroup) -> list[object]:
    with figures.style():
        return list(together_blocks(group, figures.looks(entry.name for entry in group.arms), "scenes-1"))


def without(*cells: tuple[str, int]) -> Callable[[Record], Record | None]:
    return lambda record: None if (record.arm, record.params["seed"]) in cells else record


def test_differences_are_those_of_the_seeds_that_all_arms_have(make_run: Callable[..., Path], synthetic: SimpleNamespace):
    study = study_of(synthetic, "masked", "emca", "mask_pooling", "none")
    group = group_of(make_run([study], change=without(("emca", 2)), artifacts=False))
    found = group.together["miou"]
    scores = {entry.name: entry.seeds for entry in group.arms}
    assert list(found) == ["emca", "mask_pooling", "none"]
    for name, joint in found.items():
        assert joint.estimate == pytest.approx(sum(scores[name][seed] - scores["masked"][seed] for seed in (0, 1, 3)) / 3)
        assert joint.count == 3
        assert joint.together > joint.alone > 0


def test_the_report_has_figure_and_table_best_first(make_run: Callable[..., Path], synthetic: SimpleNamespace, tmp_path: Path):
    study = study_of(synthetic, "masked", "none", "emca", "mask_pooling")
    report = render(make_run([study]), tmp_path / "out").markdown_path
    text = report.read_text(encoding="utf-8")
    part = text.split("Here all arms together tell")[1].split("\n### ")[0]
    assert "From 4 seeds that all arms have." in part
    rows = [line.split("|")[1].strip(" `") for line in part.splitlines() if line.startswith("| `")][:3]
    assert rows == ["mask_pooling", "emca", "none"]
    assert (report.parent / "figures" / "together-scenes-1.svg").stat().st_size > 10_000


def test_an_arm_that_hardly_ended_is_left_out(make_run: Callable[..., Path], synthetic: SimpleNamespace):
    study = study_of(synthetic, "masked", "emca", "mask_pooling", "none")
    group = group_of(make_run([study], change=without(*(("emca", seed) for seed in (0, 1, 2))), artifacts=False))
    assert list(group.together["miou"]) == ["mask_pooling", "none"]
    assert next(iter(group.together["miou"].values())).count == 4


@pytest.mark.parametrize("arms", [("masked", "none"), ("emca", "mask_pooling", "none")])
def test_two_arms_or_no_baseline_say_nothing(make_run: Callable[..., Path], synthetic: SimpleNamespace, arms: tuple[str, ...]):
    group = group_of(make_run([study_of(synthetic, *arms)], artifacts=False))
    assert group.together == {}
    assert blocks_of(group) == []


def test_one_seed_says_nothing(make_run: Callable[..., Path], synthetic: SimpleNamespace):
    assert blocks_of(group_of(make_run([study_of(synthetic, "masked", "emca", "none", seeds=1)], artifacts=False))) == []


def test_files_that_changed_on_the_way_say_nothing(make_run: Callable[..., Path], synthetic: SimpleNamespace):
    def versioned(record: Record) -> Record:
        return replace(record, values={**record.values, "data": f"version {record.params['seed']}"})

    group = group_of(make_run([study_of(synthetic, "masked", "emca", "none")], change=versioned, artifacts=False))
    assert not group.same_images
    assert blocks_of(group) == []


@pytest.mark.parametrize(
    ("estimate", "together", "said"),
    [(2.0, 1.0, "better"), (0.1, 0.4, "not worse"), (0.1, 2.0, "undecided"), (-2.0, 1.0, "worse"), (-0.6, 0.2, "undecided")],
)
@pytest.mark.parametrize("sensitivity", ["can decide", "undecided"])
def test_verdicts(make_run: Callable[..., Path], synthetic: SimpleNamespace, estimate: float, together: float, said: str, sensitivity: str):
    group = group_of(make_run([study_of(synthetic, "masked", "emca", "none")], artifacts=False))
    joints = {"miou": {"emca": Joint(estimate, together / 2, together, 4)}}
    table = together_table(replace(group, together=joints, sensitivity=sensitivity), ["emca"])
    blind = said == "not worse" and sensitivity == "undecided"
    assert [row[3].text for row in table.rows] == [said + "*" * blind]
    assert bool(table.caption) == blind
