"""All arms against the baseline at once: who is in it, what is said, and where there is nothing to say."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from emca_bench import stats
from emca_bench.records import Record
from emca_bench.report import figures
from emca_bench.report.accuracy import AccuracyGroup, accuracy_groups
from emca_bench.report.build import render
from emca_bench.report.document import Paragraph
from emca_bench.report.load import load_run
from emca_bench.report.tables import EMPTY
from emca_bench.report.together import together_blocks, together_table
from emca_bench.specs import Study
from emca_bench.stats import Joint, JointDifferences


def study_of(synthetic: SimpleNamespace, *arms: str, seeds: int = 4) -> Study:
    axes = {"dataset": ("scenes",), "seed": tuple(range(seeds))}
    return replace(synthetic.accuracy_study(), arms=synthetic.arms(*arms), axes=axes, expected=())


def group_of(folder: Path) -> AccuracyGroup:
    (group,) = accuracy_groups(load_run(folder))
    return group


def blocks_of(group: AccuracyGroup) -> list[object]:
    with figures.style():
        return list(together_blocks(group, figures.looks(entry.name for entry in group.arms), "scenes-1"))


def said_of(group: AccuracyGroup) -> str:
    paragraph = blocks_of(group)[0]
    assert isinstance(paragraph, Paragraph)
    return str(paragraph.text)


def without(*cells: tuple[str, int]) -> Callable[[Record], Record | None]:
    return lambda record: None if (record.arm, record.params["seed"]) in cells else record


def test_differences_are_those_of_the_seeds(make_run: Callable[..., Path], synthetic: SimpleNamespace):
    study = study_of(synthetic, "masked", "emca", "mask_pooling", "none")
    group = group_of(make_run([study], change=without(("emca", 2)), artifacts=False))
    found = group.together["miou"]
    scores = {entry.name: entry.seeds for entry in group.arms}
    assert list(found.arms) == ["emca", "mask_pooling", "none"]
    assert [joint.count for joint in found.arms.values()] == [3, 4, 4]
    expected = stats.joint_differences(scores, "masked")
    assert found == expected
    assert "From 3 to 4 seeds an arm." in said_of(group)


def test_the_report_has_figure_and_table_best_first(make_run: Callable[..., Path], synthetic: SimpleNamespace, tmp_path: Path):
    study = study_of(synthetic, "masked", "none", "emca", "mask_pooling")
    report = render(make_run([study]), tmp_path / "out").markdown_path
    text = report.read_text(encoding="utf-8")
    part = text.split("Here all arms together tell")[1].split("\n### ")[0]
    assert "From 4 seeds an arm. By this error, scenes can tell cross-attentions apart." in part
    assert "Left out" not in part
    rows = [line.split("|")[1].strip() for line in part.splitlines() if line.startswith("| `")][:3]
    assert rows == ["`mask_pooling`", "`emca`", "`none` (floor)"]
    summary = json.loads((report.parent / "summary.json").read_text(encoding="utf-8"))
    assert set(summary["accuracy"][0]["together"]["arms"]) == {"mask_pooling", "emca", "none"}
    assert (report.parent / "figures" / "together-scenes-1.svg").stat().st_size > 10_000


def test_an_arm_that_hardly_ended_is_left_out(make_run: Callable[..., Path], synthetic: SimpleNamespace):
    study = study_of(synthetic, "masked", "emca", "mask_pooling", "none")
    group = group_of(make_run([study], change=without(*(("emca", seed) for seed in (0, 1, 2))), artifacts=False))
    assert list(group.together["miou"].arms) == ["mask_pooling", "none"]
    assert said_of(group).endswith("Left out, with fewer than 2 seeds that the baseline has too: EMCA (folded).")


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


@pytest.mark.parametrize(("floor", "blind"), [(-5.0, False), (-0.4, True)])
@pytest.mark.parametrize(("estimate", "said"), [(3.0, "better"), (0.1, "not worse"), (-3.0, "worse")])
def test_good_verdicts_are_starred_where_leaving_all_out_costs_little(
    make_run: Callable[..., Path], synthetic: SimpleNamespace, estimate: float, said: str, floor: float, blind: bool
):
    group = group_of(make_run([study_of(synthetic, "masked", "emca", "none")], artifacts=False))
    joints = {name: Joint(value, 0.2, 0.4, 4) for name, value in (("emca", estimate), ("none", floor))}
    together = {"miou": JointDifferences("masked", joints, {"masked": 0.3, "emca": 0.3, "none": 0.3}, 0.3)}
    table = together_table(replace(group, together=together), ["emca"])
    star = "*" * (blind and said != "worse")
    assert [row[3].text for row in table.rows] == [said + star]
    assert str(table.caption).startswith("* Not shown to mean anything") == bool(star)


def test_a_metric_that_an_arm_lacks_is_an_empty_cell(make_run: Callable[..., Path], synthetic: SimpleNamespace):
    study = study_of(synthetic, "masked", "emca", "none")
    study = replace(study, fixed={**study.fixed, "task": "panoptic"})

    def with_segments(record: Record) -> Record:
        score = float(record.params["seed"]) + len(record.arm)
        ap = {} if record.arm == "emca" else {"ap": score}
        return replace(record, values={**record.values, "pq": score, **ap})

    group = group_of(make_run([study], change=with_segments, artifacts=False))
    assert set(group.together) == {"pq", "miou"}
    judged = group.together["pq"]
    lacking = replace(judged, arms={"none": judged.arms["none"]})
    both = replace(group, together={**group.together, "ap": lacking})
    with figures.style():
        table = together_table(both, ["emca", "none"])
        assert together_blocks(both, figures.looks(["masked", "emca", "none"]), "scenes-1")
    assert [row[5] == EMPTY for row in table.rows] == [True, False]
