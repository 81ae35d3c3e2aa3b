from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from emca_bench.errors import UsageError
from emca_bench.records import read_records
from emca_bench.report.load import load_run
from emca_bench.specs import canonical_json


def test_every_planned_cell_has_a_result(full_run):
    run = load_run(full_run)
    assert run.count() == run.count("ok") == len(run.results)
    assert run.unused_records == 0


def test_a_later_success_wins_over_failures_and_over_earlier_successes(make_run, synthetic):
    folder = make_run([synthetic.attention_study()])
    record = next(record for record in read_records(folder / "records.jsonl") if record.measure == "memory")
    later = [
        replace(record, status="failed", reason="first", values={}),
        replace(record, values={"peak_memory_bytes": 7}),
        replace(record, status="failed", reason="after", values={}),
    ]
    with (folder / "records.jsonl").open("a") as file:
        file.writelines(canonical_json(asdict(entry)) + "\n" for entry in later)
    result = load_run(folder).results[record.key]
    assert result.values == {"peak_memory_bytes": 7}
    assert (result.status, result.reason) == ("ok", "")


def test_records_of_other_contexts_are_left_out_and_counted(make_run, synthetic):
    folder = make_run([synthetic.flops_study()], change=lambda record: replace(record, context="other"))
    run = load_run(folder)
    assert run.count("not run") == run.count() == run.unused_records


def test_statuses_of_unfinished_cells(make_run, synthetic):
    study = replace(synthetic.attention_study(), axes={"pixels": ("16x16",)})

    def change(record):
        if record.measure != "latency":
            return record
        lost = {"masked": record.round > 1, "emca": True, "pem_ca": True, "emca_soft": True}.get(record.arm, False)
        if not lost:
            return record
        if record.arm == "emca_soft":
            return None
        status = "impossible" if record.arm == "pem_ca" else "failed"
        return replace(record, status=status, reason=f"no\n such {record.arm}", samples={}, values={})

    run = load_run(make_run([study], change=change))
    found = {result.cell.arm.name: (result.status, result.reason) for result in run.results.values() if result.measure == "latency"}
    assert found["masked"] == ("partial", "no such masked")
    assert found["emca"] == ("failed", "no such emca")
    assert found["pem_ca"] == ("impossible", "no such pem_ca")
    assert found["emca_soft"] == ("not run", "")
    assert found["masked_fused"] == ("ok", "")


@pytest.mark.parametrize("missing", ["study.lock.json", "environment.json"])
def test_a_folder_without_its_files_is_no_run_folder(make_run, missing):
    folder = make_run()
    (folder / missing).unlink()
    with pytest.raises(UsageError, match=f"no run folder: {missing}"):
        load_run(folder)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("environment.json", "{", "not JSON"),
        ("environment.json", '{"current": "a", "environments": {}}', "lacks 'a'"),
        ("environment.json", "[]", "lacks"),
        ("study.lock.json", "{", "not JSON"),
        ("study.lock.json", '{"schema": 1, "studies": [{"name": "x"}]}', "edited or damaged"),
        ("study.lock.json", '{"schema": 99, "studies": []}', "schema 99"),
        ("records.jsonl", "garbage\n{}\n", "line 1: not a JSON record"),
    ],
)
def test_damaged_files_are_named(make_run, name, content, match):
    folder = make_run()
    (folder / name).write_text(content)
    with pytest.raises(UsageError, match=match) as error:
        load_run(folder)
    assert name in str(error.value)


def test_a_folder_without_records_loads_as_not_run(make_run):
    folder = make_run()
    (folder / "records.jsonl").unlink()
    run = load_run(folder)
    assert run.count("not run") == run.count() > 0


@pytest.mark.parametrize(
    ("entry", "commands"),
    [({"commands": ["a", "b"]}, ["a", "b"]), ({"command": "a"}, ["a"]), ({"command": ""}, []), ({}, [])],
    ids=["several", "older", "older without", "none"],
)
def test_commands_of_a_run(make_run, synthetic, entry, commands):
    environment = {name: value for name, value in synthetic.ENVIRONMENT.items() if name != "command"}
    assert load_run(make_run(environment={**environment, **entry})).environment.commands == commands


def test_environment_of_the_current_context_is_taken(make_run, synthetic):
    folder = make_run()
    data = json.loads((folder / "environment.json").read_text())
    data["environments"]["other"] = {"identity": {"cpu": "else"}, "state": {}, "command": ""}
    (folder / "environment.json").write_text(json.dumps(data))
    assert load_run(folder).environment.identity["cpu"] == synthetic.ENVIRONMENT["identity"]["cpu"]
