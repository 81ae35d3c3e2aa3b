from __future__ import annotations

from dataclasses import replace

import pytest

from emca_bench.errors import UsageError
from emca_bench.report.compare import compare_runs


def test_a_faster_second_run_is_found_and_its_conditions_are_told_apart(make_run, synthetic):
    study = replace(synthetic.attention_study(), axes={"pixels": ("64x64",)})

    def steady(factor):
        def change(record):
            latency = 10 * factor * (1 + 0.001 * record.round)
            return replace(record, samples={"latency_ms": [latency]}) if record.measure == "latency" else record

        return change

    environment = {**synthetic.ENVIRONMENT, "identity": {**synthetic.ENVIRONMENT["identity"], "torch": "2.14.0"}}
    first = make_run([study], name="first", change=steady(1.0))
    second = make_run([study], name="second", change=steady(0.5), environment=environment)
    text = compare_runs(first, second)
    assert "torch: 2.13.0 -> 2.14.0" in text
    assert "not interleaved" in text
    assert text.splitlines()[-1] == "7 cells: 7 faster."


def test_runs_without_common_cells_cannot_be_compared(make_run, synthetic):
    first = make_run([synthetic.attention_study()], name="first")
    second = make_run([synthetic.flops_study()], name="second")
    with pytest.raises(UsageError, match="no measured latency of the same cell"):
        compare_runs(first, second)
