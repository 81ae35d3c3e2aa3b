"""Published claims beside their measured counterparts, each with a verdict and the reason for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from emca_bench import stats
from emca_bench.report import numbers
from emca_bench.report.counts import by_fvcore
from emca_bench.report.load import Result, Run, data_versions, distinct_cells, point
from emca_bench.specs import Cell, Expected, Study, Value
from emca_bench.stats import MIN_ROUNDS, MIN_SEEDS, Mean, Ratio

Verdict = Literal["reproduced", "differs", "undecided", "not comparable", "not run"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One published number against one baseline under one set of conditions."""

    expected: Expected
    study: Study
    against: str | None
    published: str
    measured: str
    """With its interval; empty where nothing was measured."""
    estimate: float | None
    low: float | None
    high: float | None
    conditions: str
    verdict: Verdict
    reason: str


def claims(run: Run) -> list[Claim]:
    """Every `[[expected]]` entry of the run's studies, once per baseline and matching point of the axes."""
    found = []
    for study in run.studies:
        for expected in study.expected:
            for against in expected.against or (None,):
                found += _rows(run, study, expected, against)
    return found


def _rows(run: Run, study: Study, expected: Expected, against: str | None) -> list[Claim]:
    measure, judge = _JUDGES[expected.metric]
    groups: dict[object, list[Cell]] = {}
    for cell in distinct_cells(study):
        if all(cell.params.get(name) == value for name, value in expected.where.items() if name not in cell.arm.overrides):
            groups.setdefault(point(study, cell, without=["seed"]), []).append(cell)
    ours = [(cells, [cell for cell in cells if cell.arm.name == expected.arm]) for cells in groups.values()]
    ours = [(cells, mine) for cells, mine in ours if mine]
    if measure not in study.measures or not ours:
        wanted = numbers.conditions(expected.where)
        why = f"the run takes no {measure}" if measure not in study.measures else f"the run plans no {expected.arm} at {wanted or 'all'}"
        return [_claim(study, expected, against, wanted, "not run", f"{why}.")]
    rows = []
    for cells, mine in ours:
        theirs = [cell for cell in cells if cell.arm.name == against]
        rows.append(judge(run, study, expected, against, _results(run, mine, measure), _results(run, theirs, measure)))
    return rows


def _results(run: Run, cells: Iterable[Cell], measure: str) -> list[Result]:
    return [result for result in (run.find(cell, measure) for cell in cells) if result is not None]


def _multiply_adds(
    run: Run, study: Study, expected: Expected, against: str | None, mine: Sequence[Result], theirs: Sequence[Result]
) -> Claim:
    where = _conditions(mine[0])
    found = by_fvcore(mine[0].values)
    if found is None:
        return _claim(study, expected, against, where, "not run", _missing(mine, "no count by fvcore's rules"))
    low, high = _band(expected, relative=True)
    exact = Mean(found.macs / 1e9, found.macs / 1e9, found.macs / 1e9, 1)
    side = "below" if exact.estimate < low else "above" if exact.estimate > high else "within"
    reason = (
        f"{side.capitalize()} the tolerated {numbers.significant(low)} to {numbers.significant(high)}, by fvcore's rules as papers count."
    )
    shown = f"{numbers.gmacs(found.macs)} GMACs"
    return _claim(study, expected, against, where, "reproduced" if side == "within" else "differs", reason, shown, exact)


def _speedup(run: Run, study: Study, expected: Expected, against: str | None, mine: Sequence[Result], theirs: Sequence[Result]) -> Claim:
    where = _conditions(mine[0])
    ours, rival = mine[0].latency_ms, theirs[0].latency_ms if theirs else {}
    ratio = stats.latency_ratio(rival, ours)
    if ratio is None:
        return _claim(study, expected, against, where, "not run", _missing([*mine, *theirs], f"no {against} to compare with"))
    if not ratio.interleaved:
        return _claim(study, expected, against, where, "undecided", numbers.NOT_INTERLEAVED, numbers.ratio(ratio), ratio)
    verdict, reason = _judge(expected, ratio, enough=ratio.rounds >= MIN_ROUNDS, relative=True, neutral=1.0)
    if verdict in ("reproduced", "differs"):
        reason += f" A ratio, so compared whatever the hardware (published: {expected.hardware})."
    elif ratio.rounds < MIN_ROUNDS:
        reason = f"Too few rounds: {ratio.rounds} of at least {MIN_ROUNDS}."
    return _claim(study, expected, against, where, verdict, reason, numbers.ratio(ratio), ratio)


def _frame_rate(run: Run, study: Study, expected: Expected, against: str | None, mine: Sequence[Result], theirs: Sequence[Result]) -> Claim:
    where = _conditions(mine[0])
    rounds = mine[0].latency_ms
    if not rounds:
        return _claim(study, expected, against, where, "not run", _missing(mine, "no latency"))
    batch = float(mine[0].cell.params.get("batch", 1))
    rate = stats.geometric_mean({index: 1000 * batch / latency for index, latency in rounds.items()})
    shown = f"{numbers.significant(rate.estimate)} FPS {numbers.interval(rate.low, rate.high, 1)}".strip()
    if expected.hardware.casefold() != hardware(run).casefold():
        reason = f"An absolute frame rate holds on its own hardware only (published: {expected.hardware}; here: {hardware(run)})."
        return _claim(study, expected, against, where, "not comparable", reason, shown, rate)
    verdict, reason = _judge(expected, rate, enough=rate.count >= MIN_ROUNDS, relative=True, neutral=None)
    if rate.count < MIN_ROUNDS:
        reason = f"Too few rounds: {rate.count} of at least {MIN_ROUNDS}."
    return _claim(study, expected, against, where, verdict, reason, shown, rate)


def _miou(run: Run, study: Study, expected: Expected, against: str | None, mine: Sequence[Result], theirs: Sequence[Result]) -> Claim:
    seeds = _seeds(mine)
    found = stats.mean_interval(list(seeds.values())) if seeds else None
    return _accuracy(study, expected, against, mine, found, lambda mean: f"{numbers.points(mean)} mIoU", "no accuracy")


def _miou_difference(
    run: Run, study: Study, expected: Expected, against: str | None, mine: Sequence[Result], theirs: Sequence[Result]
) -> Claim:
    found = stats.paired_difference(_seeds(mine), _seeds(theirs))
    missing = f"no common seed with {against}"
    both = [*mine, *theirs]
    return _accuracy(study, expected, against, both, found, lambda mean: f"{numbers.points(mean, signed=True)} mIoU", missing, neutral=0.0)


def _accuracy(
    study: Study,
    expected: Expected,
    against: str | None,
    results: Sequence[Result],
    found: Mean | None,
    show: Callable[[Mean], str],
    missing: str,
    *,
    neutral: float | None = None,
) -> Claim:
    where = _conditions(results[0])
    if found is None:
        return _claim(study, expected, against, where, "not run", _missing(results, missing))
    if len(data_versions(results)) > 1:
        return _claim(study, expected, against, where, "undecided", "The files of the data set changed between cells.", show(found), found)
    here = str(results[0].cell.params.get("dataset", ""))
    if not expected.dataset or expected.dataset.casefold() != here.casefold():
        reason = f"Accuracy on {here} says nothing about {expected.dataset or 'an unstated data set'}."
        return _claim(study, expected, against, where, "not comparable", reason, show(found), found)
    verdict, reason = _judge(expected, found, enough=found.count >= MIN_SEEDS, relative=False, neutral=neutral)
    if found.count < MIN_SEEDS:
        reason = f"Too few seeds: {found.count} of at least {MIN_SEEDS}."
    return _claim(study, expected, against, where, verdict, reason, show(found), found)


_JUDGES = {
    "speedup": ("latency", _speedup),
    "fps": ("latency", _frame_rate),
    "gmacs": ("macs", _multiply_adds),
    "miou": ("accuracy", _miou),
    "miou_difference": ("accuracy", _miou_difference),
}
"""What a metric is judged from, and by whom."""


def _judge(expected: Expected, found: Ratio | Mean, *, enough: bool, relative: bool, neutral: float | None) -> tuple[Verdict, str]:
    """Hold an estimate and its interval against the tolerance band of a claim.

    Reproduced: the estimate lies in the band, and where the band excludes "no effect", so does the interval.
    Differs: the whole interval lies outside of the band. Anything between is left open.
    """
    if not enough or found.low is None or found.high is None:
        return "undecided", "Too few repeats."
    low, high = _band(expected, relative)
    band = f"{numbers.significant(low)} to {numbers.significant(high)}"
    if found.high < low or found.low > high:
        return "differs", f"The whole interval is {'below' if found.high < low else 'above'} the tolerated {band}."
    effect = neutral is None or low <= neutral <= high or not found.low <= neutral <= found.high
    if low <= found.estimate <= high and effect:
        return "reproduced", f"The estimate is within the tolerated {band}."
    return "undecided", f"The interval neither shows nor excludes the tolerated {band}."


def _band(expected: Expected, relative: bool) -> tuple[float, float]:
    if relative:
        return expected.value / (1 + expected.tolerance), expected.value * (1 + expected.tolerance)
    return expected.value - expected.tolerance, expected.value + expected.tolerance


def _claim(
    study: Study,
    expected: Expected,
    against: str | None,
    where: str,
    verdict: Verdict,
    reason: str,
    measured: str = "",
    found: Ratio | Mean | None = None,
) -> Claim:
    return Claim(
        expected=expected,
        study=study,
        against=against,
        published=_published(expected),
        measured=measured,
        estimate=found.estimate if found else None,
        low=found.low if found else None,
        high=found.high if found else None,
        conditions=where,
        verdict=verdict,
        reason=reason,
    )


def _conditions(result: Result) -> str:
    names = ("scope", "model", "dataset", "pixels", "image_size", "batch", "dtype", "device", "steps")
    return numbers.conditions({name: result.cell.params[name] for name in names if name in result.cell.params})


def _published(expected: Expected) -> str:
    units = {"speedup": f"{expected.value:g}{numbers.TIMES}", "fps": f"{expected.value:g} FPS", "miou": f"{expected.value:g} mIoU"}
    units["gmacs"] = f"{expected.value:g} GMACs"
    return units.get(expected.metric, f"{numbers.minus(f'{expected.value:+g}')} mIoU")


def _missing(results: Sequence[Result], otherwise: str) -> str:
    for result in results:
        if not result.done:
            said = f": {result.reason}" if result.reason else ""
            return f"{result.cell.arm.name} {result.status}{said}."
    return f"The run has {otherwise}."


def _seeds(results: Iterable[Result]) -> Mapping[int, float]:
    return {
        int(result.cell.params.get("seed", 0)): float(result.values["miou"]) for result in results if result.values.get("miou") is not None
    }


def hardware(run: Run) -> str:
    """The device that the run's numbers belong to: the graphics processor if its cells used one, else the processor."""
    identity: Mapping[str, Value | None] = run.environment.identity
    devices = {str(result.cell.params.get("device", "cpu")) for result in run.results.values() if result.done}
    gpu = identity.get("gpu")
    return str(gpu if gpu and any(device != "cpu" for device in devices) else identity.get("cpu") or "unstated")
