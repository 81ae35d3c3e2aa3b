"""Rounds of different calls of run, which were never interleaved."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from emca_bench.records import Record, read_records
from emca_bench.report import numbers
from emca_bench.report.build import render
from emca_bench.report.claims import claims
from emca_bench.report.load import load_run
from emca_bench.report.speed import SpeedRow, attention_groups
from emca_bench.report.targets import targets
from emca_bench.specs import Expected, Target
from emca_bench.stats import speed_verdict

ROUNDS = 6


def identical_arms(session_of: Callable[[Record], str], slower: str, seed: int) -> Callable[[Record], Record]:
    """All arms take the same time, but the machine is 1.5 times slower in one session."""
    random = np.random.default_rng(seed)

    def change(record: Record) -> Record:
        if record.measure != "latency":
            return record
        session = session_of(record)
        factor = 1.5 if session == slower else 1.0
        samples = {"latency_ms": [float(factor * random.lognormal(0, 0.001)) for _ in range(5)]}
        return replace(record, session=session, samples=samples)

    return change


def rows(folder: Path) -> list[SpeedRow]:
    return [row for group in attention_groups(load_run(folder)) for row in group.rows]


@pytest.fixture
def study(synthetic):
    whole = synthetic.attention_study()
    return replace(whole, settings=replace(whole.settings, rounds=ROUNDS), axes={**whole.axes, "pixels": ("64x64",)})


def test_arms_of_different_sessions_get_no_verdict(make_run, study, seed):
    claim = Expected(claim="c", arm="emca", against=("masked",), metric="speedup", value=1.5, tolerance=0.1, source="s", hardware="h")
    goal = Target(target="t", metric="speedup", arm="emca", against=("masked",), at_least=1.2, where={})
    study = replace(study, expected=(claim,), targets=(goal,))
    folder = make_run([study], change=identical_arms(lambda record: "first" if record.arm == "masked" else "second", "first", seed))
    for row in rows(folder):
        if row.arm != "masked":
            ratio = row.speedups["masked"]
            assert ratio.estimate == pytest.approx(1.5, rel=0.01)
            assert not ratio.interleaved
            assert speed_verdict(ratio) == "undecided"
    [said], [judged] = claims(load_run(folder)), targets(load_run(folder))
    assert (said.verdict, said.reason) == ("undecided", numbers.NOT_INTERLEAVED)
    assert (judged.verdict, judged.reason) == ("undecided", numbers.NOT_INTERLEAVED)
    report = render(folder).markdown_path.read_text()
    assert f"1.50{numbers.TIMES}{numbers.APART} [" in report
    assert f"{numbers.APART} {numbers.NOT_INTERLEAVED}" in report
    summary = json.loads((folder / "summary.json").read_text())
    assert {entry["speedup"]["masked"]["verdict"] for entry in summary["attention"] if "masked" in entry["speedup"]} == {"undecided"}


def test_a_round_that_an_interrupt_split_is_not_paired_and_the_others_are(make_run, study, seed):
    def session_of(record: Record) -> str:
        split = record.round == 3 and record.arm == "masked"
        return "first" if record.round < 3 or split else "second"

    folder = make_run([study], change=identical_arms(session_of, "first", seed))
    for row in rows(folder):
        assert len(row.rounds_ms) == ROUNDS
        if row.arm != "masked":
            ratio = row.speedups["masked"]
            assert (ratio.interleaved, ratio.rounds) == (True, ROUNDS - 1)
            assert ratio.estimate == pytest.approx(1.0, rel=0.01)
            assert speed_verdict(ratio) == "no difference"
    assert numbers.APART not in render(folder).markdown_path.read_text()


def test_an_arm_that_came_later_stands_apart_and_the_others_pair(make_run, study, seed):
    folder = make_run([study], change=identical_arms(lambda record: "second" if record.arm == "emca" else "first", "second", seed))
    interleaved = {row.arm: row.speedups["masked"].interleaved for row in rows(folder) if "masked" in row.speedups}
    assert interleaved.pop("emca") is False
    assert set(interleaved.values()) == {True}


def test_records_without_a_session_are_one_session(make_run, study):
    folder = make_run([study])
    path = folder / "records.jsonl"
    old = []
    for record in read_records(path):
        entry = asdict(record)
        del entry["session"]
        old.append(json.dumps(entry))
    before = {row.arm: row.speedups for row in rows(folder)}
    path.write_text("\n".join(old) + "\n")
    assert {row.arm: row.speedups for row in rows(folder)} == before
    assert all(ratio.interleaved and ratio.rounds == ROUNDS for speedups in before.values() for ratio in speedups.values())
