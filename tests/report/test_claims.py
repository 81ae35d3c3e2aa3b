from __future__ import annotations

from dataclasses import replace

import pytest

from emca_bench.report.claims import claims
from emca_bench.report.load import load_run
from emca_bench.specs import Expected


@pytest.fixture
def judged(make_run, synthetic):
    """The single claim row of a study that holds one expectation; latencies are `rounds` (masked) over `rounds / ratio` (emca)."""

    def judge(expected, *, ratios=(), miou=None, study=None, images=None, **options):
        speed = expected.metric in ("speedup", "fps")
        study = study or (synthetic.fps_study() if speed else synthetic.accuracy_study())
        axes = {"scope": ("end_to_end",), "image_size": ("256x256",)} if speed else {"dataset": ("camvid",), "seed": tuple(range(3))}
        study = replace(study, expected=(expected,), axes=axes)

        def change(record):
            if record.measure == "latency":
                if record.round >= len(ratios):
                    return None
                latency = 100.0 if record.arm != "emca" else 100.0 / ratios[record.round]
                return replace(record, samples={"latency_ms": [latency] * 3})
            if record.measure == "accuracy" and miou is not None:
                found = miou[record.arm]
                seed = record.params["seed"]
                if seed >= len(found):
                    return None
                return replace(record, values={**record.values, "miou": found[seed], "data": (images or {}).get(record.arm, "same")})
            return record

        rows = claims(load_run(make_run([study], artifacts=False, change=change, **options)))
        assert len(rows) == 1
        return rows[0]

    return judge


def speedup(**options) -> Expected:
    given = {"metric": "speedup", "value": 1.2, "arm": "emca", "against": ("masked",), "source": "s", "tolerance": 0.1, **options}
    return Expected(claim="c", **given)


def test_speedup_in_the_band_is_reproduced_whatever_the_hardware(judged):
    row = judged(speedup(hardware="V100"), ratios=[1.19, 1.21, 1.20])
    assert row.verdict == "reproduced"
    assert "whatever the hardware (published: V100)" in row.reason
    assert row.measured.startswith("1.20\N{MULTIPLICATION SIGN} [")
    assert row.estimate == pytest.approx(1.2, rel=1e-3)


@pytest.mark.parametrize(("ratios", "side"), [([2.0, 2.02, 1.98], "above"), ([0.9, 0.91, 0.89], "below")])
def test_speedup_off_the_band_differs(judged, ratios, side):
    row = judged(speedup(), ratios=ratios)
    assert row.verdict == "differs"
    assert side in row.reason


def test_speedup_with_a_wide_interval_is_left_open(judged):
    row = judged(speedup(), ratios=[0.8, 1.2, 1.8])
    assert row.verdict == "undecided"
    assert "neither shows nor excludes" in row.reason


def test_two_rounds_are_never_a_verdict(judged):
    row = judged(speedup(), ratios=[1.2, 1.2])
    assert row.verdict == "undecided"
    assert row.reason == "Too few rounds: 2 of at least 3."


def test_unmeasured_speedup_is_not_run(judged):
    row = judged(speedup(), ratios=[])
    assert row.verdict == "not run"
    assert row.measured == ""


def test_a_claim_about_other_conditions_than_planned_is_not_run(judged):
    row = judged(speedup(where={"image_size": "512x512"}), ratios=[1.2] * 3)
    assert row.verdict == "not run"
    assert "plans no emca" in row.reason


def frames(**options) -> Expected:
    return Expected(**{"claim": "c", "metric": "fps", "value": 10.0, "arm": "masked", "source": "s", **options})


def test_frame_rate_on_other_hardware_is_not_comparable(judged):
    row = judged(frames(hardware="V100"), ratios=[1.0] * 3)
    assert row.verdict == "not comparable"
    assert "V100" in row.reason
    assert row.measured.startswith("10.0 FPS")


@pytest.mark.parametrize(("value", "verdict"), [(10.0, "reproduced"), (33.7, "differs")])
def test_frame_rate_on_the_same_hardware_is_judged(judged, value, verdict):
    assert judged(frames(hardware="AMD EPYC 9B14", value=value), ratios=[1.0, 1.0, 1.0]).verdict == verdict


def accuracy(metric, **options) -> Expected:
    return Expected(**{"claim": "c", "metric": metric, "value": 60.0, "arm": "emca", "source": "s", "tolerance": 0.5, **options})


SEEDS = {name: [60.0, 60.2, 59.8] for name in ("masked", "emca", "emca_soft", "emca_rawres", "mask_pooling", "none")}


@pytest.mark.parametrize(("value", "verdict"), [(60.0, "reproduced"), (45.1, "differs"), (60.7, "undecided")])
def test_accuracy_on_the_same_data_set_is_judged(judged, value, verdict):
    assert judged(accuracy("miou", dataset="CamVid", value=value), miou=SEEDS).verdict == verdict


def test_accuracy_on_another_data_set_is_not_comparable(judged):
    row = judged(accuracy("miou", dataset="ade20k"), miou=SEEDS)
    assert row.verdict == "not comparable"
    assert row.reason == "Accuracy on camvid says nothing about ade20k."


def test_a_difference_between_other_images_is_no_verdict(judged):
    claim = accuracy("miou_difference", dataset="camvid", value=1.0, against=("masked",))
    miou = {**SEEDS, "emca": [61.1, 61.1, 60.8]}
    assert judged(claim, miou=miou, images={"none": "other"}).verdict == "reproduced"
    row = judged(claim, miou=miou, images={"masked": "other"})
    assert row.verdict == "undecided"
    assert row.reason == "The files of the data set changed between cells."


def test_one_seed_is_never_a_verdict(judged):
    row = judged(accuracy("miou", dataset="camvid"), miou={name: found[:1] for name, found in SEEDS.items()})
    assert row.verdict == "undecided"
    assert row.reason == "Too few seeds: 1 of at least 2."


@pytest.mark.parametrize(("value", "verdict"), [(1.0, "reproduced"), (-2.0, "differs")])
def test_accuracy_difference_is_paired_over_seeds(judged, value, verdict):
    miou = {**SEEDS, "emca": [61.1, 61.1, 60.8]}
    row = judged(accuracy("miou_difference", dataset="camvid", value=value, against=("masked",)), miou=miou)
    assert row.verdict == verdict
    assert row.estimate == pytest.approx(1.0)


def test_a_difference_that_may_be_none_reproduces_no_claimed_effect(judged):
    """As published on average, but the seeds also allow a loss: the tolerance excludes none, the interval does not."""
    miou = {**SEEDS, "emca": [58.0, 62.2, 61.4]}
    row = judged(accuracy("miou_difference", dataset="camvid", value=0.5, tolerance=0.25, against=("masked",)), miou=miou)
    assert row.estimate == pytest.approx(0.533, abs=0.001)
    assert row.verdict == "undecided"


def test_a_failed_arm_is_not_run_with_its_reason(make_run, synthetic):
    study = replace(synthetic.attention_study(), axes={"pixels": ("64x64",)})

    def fail(record):
        return (
            replace(record, status="failed", reason="out of memory", samples={}, values={}) if record.arm == "emca_as_written" else record
        )

    rows = claims(load_run(make_run([study], change=fail)))
    assert [row.verdict for row in rows] == ["not run", "not run"]
    assert "out of memory" in rows[0].reason


def test_every_baseline_of_a_claim_gets_a_row(full_run):
    rows = [row for row in claims(load_run(full_run)) if row.study.name == "attention"]
    assert [row.against for row in rows] == ["masked", "masked_fused"]


@pytest.fixture
def counted(make_run, synthetic):
    """The single claim row of a study of counts whose masked arm has 70.58e9 multiply-adds by fvcore's rules, or none."""

    def judge(value, *, recorded=True):
        expected = Expected(claim="c", metric="gmacs", value=value, tolerance=0.02, arm="masked", source="s")
        study = replace(synthetic.flops_study(), expected=(expected,), axes={"model": ("mask2former_r50",), "image_size": ("512x512",)})

        def change(record):
            found = {"macs": 70_580_000_000, "components": {}, "added": {}, "dropped": {}}
            return replace(record, values={**record.values, "fvcore": found}) if recorded else record

        (row,) = claims(load_run(make_run([study], artifacts=False, change=change)))
        return row

    return judge


@pytest.mark.parametrize(
    ("value", "verdict", "side"), [(71, "reproduced", "Within"), (103, "differs", "Below"), (46.9, "differs", "Above")]
)
def test_multiply_adds_are_judged_as_papers_count_them(counted, value, verdict, side):
    row = counted(value)
    assert row.verdict == verdict
    assert row.reason.startswith(f"{side} the tolerated ")
    assert row.published == f"{value:g} GMACs"
    assert row.measured == "70.6 GMACs"
    assert row.estimate == row.low == row.high == pytest.approx(70.58)


def test_multiply_adds_without_a_count_by_fvcore_are_not_run(counted):
    row = counted(71, recorded=False)
    assert row.verdict == "not run"
    assert row.reason == "The run has no count by fvcore's rules."
