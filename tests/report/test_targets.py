"""Verdicts on the project's own targets, from records whose numbers are known."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from emca_bench.errors import UsageError
from emca_bench.records import Record
from emca_bench.report.build import render, report_files
from emca_bench.report.kernels import flops_rate, intensity, kernel_groups, traffic_rate
from emca_bench.report.load import load_run
from emca_bench.report.targets import Judged, targets
from emca_bench.specs import Arm, Cell, Settings, Study, Target, canonical_json, dump_lock

CEILING = {"pixels": "128x256", "dtype": "float32", "pass": "forward"}
ARMS = (
    Arm(name="eager", attention="eager", switches={"backend": "reference"}, overrides={"op": "pool_prototypes"}),
    Arm(name="native", attention="native", switches={"backend": "native"}, overrides={"op": "pool_prototypes"}),
    Arm(name="burst", attention="burst", overrides={"op": "burst", **CEILING}),
    Arm(name="matmul", attention="matmul", overrides={"op": "matmul", "pixels": "128x256", "pass": "forward"}),
    Arm(name="copy", attention="copy", overrides={"op": "copy", **CEILING}),
    Arm(name="read", attention="read", overrides={"op": "read", **CEILING}),
)
# FLOP, bytes and milliseconds of a call: 100, 80 and 40 GFLOP/s, 8 and 10 GB/s
WORK = {
    "burst": (4e9, 0, 40.0),
    "matmul": (8e8, 1e6, 10.0),
    "copy": (0, 8e8, 100.0),
    "read": (1e6, 1e9, 100.0),
    "native": (2e9, 4e7, 40.0),
    "eager": (2e9, 4e7, 164.0),
}


def speedup(**options: Any) -> Target:
    given = {"target": "t", "metric": "speedup", "arm": "native", "against": ("eager",), "at_least": 4.0}
    return Target(**{**given, "where": {"pixels": "64x64", "dtype": "float32", "pass": "forward"}, **options})


def study(*wanted: Target) -> Study:
    return Study(
        name="kernels_pool",
        title="Soft prototypes",
        question="How near?",
        measures=("latency", "memory"),
        baselines=("eager",),
        arms=ARMS,
        axes={"pixels": ("16x16", "64x64"), "dtype": ("float32", "bfloat16"), "pass": ("forward", "forward_backward")},
        fixed={"scope": "kernel", "device": "cpu", "batch": 1, "queries": 100, "width": 256, "mask": "bool", "allowed": 0.25},
        settings=Settings(rounds=4),
        targets=wanted,
    )


Change = Callable[[Record], Record | None]


@pytest.fixture
def kernel_run(tmp_path: Path, synthetic: Any) -> Callable[..., Path]:
    """A run folder of such a study; `change` alters a record on its way, or drops it."""

    def record(cell: Cell, measure: str, index: int) -> Record:
        flops, nbytes, milliseconds = WORK[cell.arm.name]
        drift = (1.0, 1.3, 0.9, 1.1)[index]
        values: dict[str, Any] = {
            "backends": {"pool_prototypes": "native (asked for by backend)"},
            "flops": int(flops),
            "bytes": int(nbytes),
        }
        samples = {"latency_ms": [milliseconds * drift] * 3}
        if measure == "memory":
            values, samples = {"peak_memory_bytes": 5 * 102400 + 1000, "gradient_bytes": 1000}, {}
        given = {"study": cell.study, "key": cell.key(measure), "measure": measure, "arm": cell.arm.name, "params": dict(cell.params)}
        return Record(context=synthetic.CONTEXT, round=index, status="ok", values=values, samples=samples, **given)

    def make(*wanted: Target, change: Change = lambda record: record, name: str = "run") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        of = study(*wanted)
        (folder / "study.lock.json").write_text(dump_lock([of]))
        environments = {"current": synthetic.CONTEXT, "environments": {synthetic.CONTEXT: synthetic.ENVIRONMENT}}
        (folder / "environment.json").write_text(json.dumps(environments))
        records = [record(cell, "latency", index) for index in range(4) for cell in of.cells()]
        records += [record(cell, "memory", 0) for cell in of.cells()]
        kept = [entry for entry in map(change, records) if entry is not None]
        (folder / "records.jsonl").write_text("".join(canonical_json(asdict(entry)) + "\n" for entry in kept))
        return folder

    return make


@pytest.fixture
def judged(kernel_run: Callable[..., Path]) -> Callable[..., Judged]:
    """The single row of a run with one target; `ratios` are eager over native, by round."""

    def judge(wanted: Target, *, ratios: tuple[float, ...] | None = None, change: Change = lambda record: record) -> Judged:
        def by_round(record: Record) -> Record | None:
            if ratios is not None and record.measure == "latency" and record.arm in ("eager", "native"):
                if record.round >= len(ratios):
                    return None
                record = replace(record, samples={"latency_ms": [40.0 * (ratios[record.round] if record.arm == "eager" else 1.0)] * 3})
            return change(record)

        (row,) = targets(load_run(kernel_run(wanted, change=by_round)))
        return row

    return judge


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ((4.1, 4.2, 4.15), "met"),
        ((3.8, 3.9, 3.85), "missed"),
        ((3.6, 4.6, 4.1), "undecided"),
        ((9.0, 9.0), "undecided"),
        ((), "not run"),
    ],
)
def test_at_least_needs_the_whole_interval(judged: Callable[..., Judged], ratios: tuple[float, ...], verdict: str) -> None:
    row = judged(speedup(), ratios=ratios)
    assert row.verdict == verdict
    assert row.asked == "\N{GREATER-THAN OR EQUAL TO} 4\N{MULTIPLICATION SIGN}"
    assert ("Too few rounds: 2 of at least 3." == row.reason) == (len(ratios) == 2)


def test_a_missed_target_says_what_served_the_call(judged: Callable[..., Judged]) -> None:
    assert judged(speedup(at_least=5.0)).reason.endswith("pool_prototypes was served by native (asked for by backend).")


def test_a_share_of_the_traffic_is_one_of_bytes_per_second(judged: Callable[..., Judged]) -> None:
    """40 MB in 40 ms are 1 GB/s, an eighth of the copy's 8."""
    where = {"pixels": "16x16", "dtype": "float32", "pass": "forward"}
    row = judged(speedup(metric="traffic_share", against=("copy",), at_least=0.1, where=where))
    assert row.measured == "12.5 % [12.5, 12.5]"


def test_a_share_of_a_ceiling_is_paired_over_its_one_cell(judged: Callable[..., Judged]) -> None:
    """2 GFLOP in 40 ms are 50 GFLOP/s, half of the burst's 100, in every round whatever the drift."""
    row = judged(
        speedup(metric="rate_share", against=("burst",), at_least=0.5, where={"pixels": "16x16", "dtype": "bfloat16", "pass": "forward"})
    )
    assert row.found is not None
    assert row.found.estimate == pytest.approx(0.5)
    assert row.measured == "50.0 % [50.0, 50.0]"
    assert row.asked.endswith("50 %")


@pytest.mark.parametrize(("at_most", "verdict"), [(15.0, "missed"), (40_000_000.0, "met")])
def test_an_overhead_is_a_difference_in_microseconds(judged: Callable[..., Judged], at_most: float, verdict: str) -> None:
    """Eager minus native, 124 ms in the drift of its round."""
    wanted = speedup(metric="overhead_us", arm="eager", against=("native",), at_least=None, at_most=at_most)
    row = judged(wanted)
    assert row.verdict == verdict
    assert row.found is not None
    assert row.found.estimate == pytest.approx(124_000 * (1.0 + 1.3 + 0.9 + 1.1) / 4)


@pytest.mark.parametrize(("at_most", "verdict"), [(5.0, "met"), (4.9, "missed")])
def test_extra_memory_is_counted_in_matrices_of_queries(judged: Callable[..., Judged], at_most: float, verdict: str) -> None:
    """512000 bytes are five matrices of 100 x 256 float32."""
    row = judged(speedup(metric="extra_memory", against=(), at_least=None, at_most=at_most))
    assert row.verdict == verdict
    assert row.measured == "5.00 Q\N{MULTIPLICATION SIGN}C"


def test_a_cell_that_cannot_run_gives_its_reason(judged: Callable[..., Judged]) -> None:
    def no_compiler(record: Record) -> Record:
        if record.arm != "native":
            return record
        return replace(record, status="impossible", reason="no C++ compiler", values={}, samples={})

    row = judged(speedup(), change=no_compiler)
    assert row.verdict == "not run"
    assert row.reason == "native impossible: no C++ compiler."


def test_a_target_without_where_has_a_row_per_point_and_rival(kernel_run: Callable[..., Path]) -> None:
    rows = targets(load_run(kernel_run(speedup(where={}, against=("eager", "burst")))))
    assert len(rows) == 2 * 2 * 2 * 2
    assert {row.verdict for row in rows} == {"met", "missed"}
    assert [row.found.estimate for row in rows if row.found and row.against == "burst"] == [pytest.approx(1.0)] * 8


def test_a_target_at_a_point_that_is_not_planned_is_not_run(judged: Callable[..., Judged]) -> None:
    row = judged(speedup(where={"pixels": "128x256"}))
    assert (row.verdict, row.reason) == ("not run", "the run plans no native at 128\N{MULTIPLICATION SIGN}256 pixels.")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"at_most": 2.0}, "either at_least or at_most"),
        ({"at_least": None}, "either at_least or at_most"),
        ({"against": ()}, "needs arms to stand against"),
        ({"metric": "extra_memory"}, "needs no 'against'"),
    ],
)
def test_targets_that_mean_nothing_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        speedup(**options)


def test_rates_and_shares_of_the_roofline_are_those_of_hand_computation(kernel_run: Callable[..., Path]) -> None:
    """Without drift: 50 GFLOP/s and 1 GB/s at 50 FLOP/byte, below 100 GFLOP/s (burst beats matmul) and 10 GB/s (read beats copy)."""

    def steady(record: Record) -> Record:
        return replace(record, samples={"latency_ms": [WORK[record.arm][2]] * 3} if record.measure == "latency" else {})

    ((*groups,),) = kernel_groups(load_run(kernel_run(change=steady)))
    assert len(groups) == 4
    for group in groups:
        assert group.compute is not None
        assert group.memory is not None
        assert (group.compute.name, group.compute.rate) == ("burst", pytest.approx(100e9))
        assert (group.memory.name, group.memory.rate) == ("read", pytest.approx(10e9))
        assert {row.arm for row in group.group.rows} == {"eager", "native"}
        row = group.group.measured("native")[0]
        assert flops_rate(row) == pytest.approx(50e9)
        assert traffic_rate(row) == pytest.approx(1e9)
        assert intensity(row) == pytest.approx(50.0)
        assert group.bound_ms(row) == pytest.approx(20.0)
        assert group.reached(row) == pytest.approx(0.5)
        assert group.limit(row) == "compute"


def test_without_the_burst_the_matrix_product_of_the_dtype_is_the_roof_and_traffic_may_bound(kernel_run: Callable[..., Path]) -> None:
    def change(record: Record) -> Record | None:
        if record.arm == "burst":
            return replace(record, status="impossible", reason="no compiler", values={}, samples={})
        if record.measure == "memory":
            return record
        slow = record.arm == "matmul" and record.params["dtype"] == "bfloat16"
        heavy = {"bytes": int(4e8)} if record.arm == "native" else {}
        latency = WORK[record.arm][2] * (2 if slow else 1)
        return replace(record, values={**record.values, **heavy}, samples={"latency_ms": [latency] * 3})

    ((*groups,),) = kernel_groups(load_run(kernel_run(change=change)))
    rates = {group.group.shared["dtype"]: group.compute.rate for group in groups if group.compute}
    assert rates == {"float32": pytest.approx(80e9), "bfloat16": pytest.approx(40e9)}
    row = groups[0].group.measured("native")[0]
    assert groups[0].limit(row) == "memory"
    assert groups[0].bound_ms(row) == pytest.approx(40.0)
    assert groups[0].reached(row) == pytest.approx(1.0)


def test_the_report_has_targets_tables_and_a_roofline(kernel_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = kernel_run(speedup(), speedup(at_least=5.0))
    text = render(folder, tmp_path / "report").markdown_path.read_text()
    assert "Of 2 comparisons with the project's own targets: 1 met, 1 missed." in text
    targets_part, operators_part = text.split("## Targets")[1].split("## Operators")
    assert [line.split("|")[6].strip() for line in targets_part.splitlines() if line.startswith("| t ")] == ["met", "missed"]
    rows = [line.split("|") for line in operators_part.split("## Cross")[0].splitlines() if "`native`" in line]
    assert len(rows) == 8
    head = next(line for line in operators_part.splitlines() if line.startswith("| Pixels"))
    columns = [name.strip() for name in head.split("|")]
    shown = dict(zip(columns, (cell.strip() for cell in rows[0]), strict=True))
    assert (shown["Share of bound"], shown["Bound by"], shown["FLOP/byte"], shown["Backend"]) == ("50 %", "compute", "50.0", "native")
    assert {name for name in ("burst", "copy") if f"`{name}`" in operators_part.split("## Cross")[0]} == set()
    assert (tmp_path / "report" / "figures" / "roofline-kernels_pool.svg").is_file()
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert [entry["verdict"] for entry in summary["targets"]] == ["met", "missed"]
    assert summary["kernels"][0]["ceilings"]["compute"]["measured_by"] == "burst"


def test_the_same_records_give_the_same_bytes(kernel_run: Callable[..., Path]) -> None:
    folder = kernel_run(speedup())
    assert report_files(folder) == report_files(folder)


@pytest.mark.parametrize("kept", [(), ("native",), ("native", "burst"), ("burst", "read")])
def test_reports_of_parts_render(kernel_run: Callable[..., Path], kept: tuple[str, ...]) -> None:
    files = report_files(kernel_run(speedup(), change=lambda record: record if record.arm in kept else None))
    assert b"not run" in files["report.md"]
    assert "figures/roofline-kernels_pool.svg" not in files
