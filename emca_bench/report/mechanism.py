"""The generated tasks of `measure.mechanism` as a table."""

from __future__ import annotations

from emca_bench import stats
from emca_bench.report import numbers
from emca_bench.report.document import Block, Column, Heading, Paragraph, Strong, Table, Value
from emca_bench.report.load import Run
from emca_bench.report.tables import EMPTY, arm, verdict
from emca_bench.specs import Cell, Study

NEEDS = {"one": "One marked pixel", "mean": "Mean of the mask", "modes": "Several marked pixels", "apart": "Two, told apart"}
"""Recorded names of the tasks, and their heads in the table."""

_SAID = (
    "Explained variance of the answers in per cent, mean over seeds with its 95 % interval: 0 is what always saying zero gives, 100 is all "
    "right. The mask is given and always right. This shows what a mechanism can learn, and nothing about accuracy on images."
)


def mechanism_blocks(run: Run) -> list[Block]:
    """Heading and a table per study; nothing where no study asks for it."""
    blocks: list[Block] = []
    for study, cells in run.planned("mechanism"):
        blocks += [Paragraph(Strong(study.question)), mechanism_table(run, study, cells)]
    return [Heading(2, "Mechanism"), *blocks] if blocks else []


def mechanism_table(run: Run, study: Study, cells: list[Cell]) -> Table:
    """Arms by tasks."""
    needs = [need for need in NEEDS if any(cell.params["need"] == need for cell in cells)]
    columns = [Column("Arm"), *(Column(NEEDS[need], "right") for need in needs)]
    rows = []
    for name in dict.fromkeys(cell.arm.name for cell in cells):
        mine = [cell for cell in cells if cell.arm.name == name]
        rows.append([arm(name), *(_explained(run, [cell for cell in mine if cell.params["need"] == need]) for need in needs)])
    seeds = len({cell.params.get("seed") for cell in cells})
    first = cells[0].params
    where = numbers.conditions({key: first[key] for key in ("pixels", "queries", "width", "batch") if key in first})
    return Table(columns, rows, f"{_SAID} Conditions: {where}, {first['steps']} steps, {numbers.plural(seeds, 'seed')}.")


def _explained(run: Run, cells: list[Cell]) -> Value:
    results = [result for cell in cells if (result := run.find(cell, "mechanism")) is not None]
    found = [float(result.values["explained"]) for result in results if "explained" in result.values]
    if not found:
        return verdict(results[0].status) if results else EMPTY
    mean = stats.mean_interval(found)
    return Value(numbers.points(mean), sort=mean.estimate)
