"""The report's closing notes: how it was measured, compared and counted."""

from __future__ import annotations

from emca_bench import stats
from emca_bench.report.accuracy import METRICS
from emca_bench.report.document import Block, Bullets, Heading, Strong, Text
from emca_bench.report.load import Run
from emca_bench.specs import Study

_INTERLEAVING = """Each cell is measured once per round, in an order shuffled anew, so that slow drifts of clock and temperature reach all
rivals alike."""
_LATENCY = f"""A round yields the median of its calls. A cell's latency is the geometric mean of its round medians; a speedup is the
geometric mean of the ratios within rounds, with a Student t interval at {stats.CONFIDENCE:.0%} on their logarithms."""
_SPEED = f"""Faster or slower needs an interval that excludes 1 and an estimate beyond {stats.FLOOR:.0%}; no difference needs the
whole interval within {stats.FLOOR:.0%}. Fewer than {stats.MIN_ROUNDS} rounds are always undecided. Verdicts are not corrected for
their number."""
_BASELINES = """As published (weights requested, never the fused path) and fused (scaled dot product attention). A win over the slower one
alone is no win."""
_ACCURACY = """Differences are paired over common seeds. Not worse needs an interval above minus the margin; one seed is never a
verdict. Where all arms are compared at once, the error is what a fit of an effect of each arm and of each seed leaves (a randomised
block design: all arms scatter alike, and no seed favours an arm); the second interval is Dunnett's, and better needs one above zero, by
however little. Each word is wrong in at most 2.5 % of studies then."""
_PANOPTIC = """PQ is the mean over classes of the intersections over union of matched segments, over matches plus half of the
misses and of the false alarms; a match needs more than one half. Void and crowds as in the COCO panoptic API. AP is COCO's, over
thresholds 0.50 to 0.95, of masks against the things of the panoptic truth. All results of a row come from the same weights and the same
forward passes."""
_FLOORS = """Arm none: the queries never see the image in this sub-layer. Always the commonest class: no model at all. Arm mask_pooling:
the same cost without a search."""
_COUNTING = """MACs are multiply-adds, not FLOPs (1 MAC = 2 FLOPs). Operators without a count are listed, not guessed."""


def method_notes(run: Run) -> list[Block]:
    """The section, with the margins of this run."""
    judged = [(study.margin, label) for study in run.studies if "accuracy" in study.measures for label in _metrics(study)]
    words = {label: ", ".join(f"{value:g}" for value in sorted({value for value, of in judged if of == label})) for _, label in judged}
    said = " and ".join(f"{values} {label}" for label, values in words.items())
    margin = f" The margin was stated before the run: {said}." if judged else ""
    panoptic = {"Panoptic quality and AP": _PANOPTIC} if "PQ" in words else {}
    notes = {
        "Interleaving": _INTERLEAVING,
        "Latency": _LATENCY,
        "Verdicts on speed": _SPEED,
        "Two baselines": _BASELINES,
        "Accuracy": _ACCURACY + margin,
        **panoptic,
        "Floors": _FLOORS,
        "Counting": _COUNTING,
    }
    items: list[Text] = [(Strong(f"{name}."), f" {' '.join(text.split())}") for name, text in notes.items()]
    return [Heading(2, "Method notes"), Bullets(items)]


def _metrics(study: Study) -> list[str]:
    """What the study's margin is in points of."""
    return list(dict.fromkeys(METRICS[str(cell.params.get("task", "semantic"))][0].label for cell in study.cells()))
