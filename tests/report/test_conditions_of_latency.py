"""What a latency record says beside its samples: energy, and where the time goes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from emca_bench.records import Record
from emca_bench.report.build import render
from emca_bench.report.load import load_run
from emca_bench.report.speed import free_attention_bound, model_groups
from emca_bench.report.targets import targets
from emca_bench.specs import Target


def saying(**values: Any) -> Any:
    def change(record: Record) -> Record:
        return replace(record, values={**record.values, **values}) if record.measure == "latency" else record

    return change


def test_energy_is_a_column_only_where_it_was_measured(make_run, synthetic):
    studies = [synthetic.fps_study()]
    metered = make_run(studies, name="metered", change=saying(energy_per_image_j=2.5))
    text = render(metered).markdown_path.read_text()
    assert "J per image" in text
    assert "| 2.50 |" in text
    plain = make_run(studies, name="plain", change=saying(no_energy="no counters here"))
    text = render(plain).markdown_path.read_text()
    assert "J per image" not in text
    assert "| no energy | no counters here |" in text


def test_a_missed_target_says_where_the_time_goes(make_run, synthetic):
    where = {"scope": "end_to_end", "image_size": "512x512"}
    goals = [Target(target="t", metric="speedup", arm="emca", against=("masked",), at_least=least, where=where) for least in (0.01, 1000.0)]
    study = replace(synthetic.fps_study(), targets=tuple(goals))
    folder = make_run([study], change=saying(component_ms={"backbone": 30.0, "pixel_decoder": 60.0, "other": 10.0}))
    met, missed = targets(load_run(folder))
    assert (met.verdict, missed.verdict) == ("met", "missed")
    assert missed.reason.endswith("Its time: pixel decoder 60%, backbone 30%, other 10%.")
    assert "Its time" not in met.reason


def test_the_bound_is_of_an_arm_that_differs_in_attention_alone(make_run, synthetic):
    """Leaving out attention and the work of a rewrite at once bounds no attention."""
    plain = synthetic.fps_study()
    rewritten = tuple(replace(arm, overrides={"mask_source": "features"}) if arm.name == "none" else arm for arm in plain.arms)
    for study, is_bound in ((plain, True), (replace(plain, arms=rewritten), False)):
        groups = model_groups(load_run(make_run([study], name=f"bound-{is_bound}")))
        assert {free_attention_bound(group, "masked") is not None for group in groups} == {is_bound}
