"""The report's first paragraph: what the run shows, in sentences, with nothing rounded up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from emca_bench.report import numbers
from emca_bench.report.accuracy import AccuracyGroup
from emca_bench.report.arms import arm_named, label, subject
from emca_bench.report.claims import Verdict
from emca_bench.report.counts import CountRow
from emca_bench.report.findings import Findings
from emca_bench.report.numbers import TIMES
from emca_bench.report.speed import SpeedGroup, SpeedRow, crossing, free_attention_bound, largest
from emca_bench.report.targets import TargetVerdict
from emca_bench.specs import Study
from emca_bench.stats import speed_verdict


def answer(found: Findings) -> str:
    """One paragraph; a run without results gets one that says so."""
    run = found.run
    done, planned = run.count("ok"), run.count()
    if not run.count("ok", "partial"):
        return f"Nothing has been measured yet: 0 of {planned} planned measurements are there."
    sentences = []
    if run.quick:
        sentences.append("This is a quick run: it shows that everything works, and decides little.")
    if done < planned:
        sentences.append(f"{done} of {planned} planned measurements are complete.")
    sentences += [_attention(group) for group in found.attention[:1]]
    sentences += [_model(found)]
    counts = [rows for rows in found.model_counts if rows[0].cell.params["model"] == found.model_counts[0][0].cell.params["model"]]
    sentences += [_bound(counts[-1])] if counts else []
    sentences += [_accuracy(group) for group in found.accuracy]
    sentences += [_claims(found), _targets(found)]
    return " ".join(sentence for sentence in sentences if sentence) or f"All {planned} planned measurements are complete: see the tables."


def _attention(group: SpeedGroup) -> str:
    name = subject(group.study)
    row = largest(group, name) if name else None
    if name is None or row is None or not row.speedups:
        return ""
    text = (
        f"Cross-attention alone, at {numbers.size(row.cell.params['pixels'])} pixels: {label(name)} runs {_comparisons(row, group.study)}"
    )
    crossings = [(baseline, crossing(group, name, baseline)) for baseline in row.speedups]
    passed = [
        f"{label(baseline)} at about {pixels:.0f}" for baseline, pixels in crossings if pixels and row.speedups[baseline].estimate > 1
    ]
    return text + (f", and passes {_sentence(passed)} pixels." if passed else ".")


def _sentence(parts: Iterable[str]) -> str:
    """`a, b and c`."""
    words = list(parts)
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _comparisons(row: SpeedRow, study: Study) -> str:
    """`at 1.13× [1.11, 1.16] the speed of masked (fused) (faster)` for each baseline; a quick run has no verdicts."""
    return _sentence(
        f"at {numbers.ratio(ratio)} the speed of {label(name)}" + ("" if study.quick else f" ({speed_verdict(ratio)})")
        for name, ratio in row.speedups.items()
    )


def _model(found: Findings) -> str:
    for scope in ("end_to_end", "model", "decoder"):
        groups = [group for group in found.models if group.shared.get("scope") == scope and group.rows]
        # the first model that a study names is what the run is about: of its groups with EMCA, that of the largest images
        about = groups[0].rows[0].cell.params["model"] if groups else None
        groups = [group for group in groups if group.rows[0].cell.params["model"] == about]
        for group in sorted(groups, key=_weight, reverse=True):
            row = next((row for row in group.rows if row.arm == subject(group.study) and row.speedups), None)
            if row is None:
                continue
            params = row.cell.params
            where = f"{numbers.SCOPE_NAMES[scope].capitalize()} ({params['model']}, {numbers.size(params['image_size'])})"
            bounds = [(base, free_attention_bound(group, base)) for base in group.study.baselines]
            limits = _sentence(f"{bound.estimate:.2f}{TIMES} over {label(base)}" for base, bound in bounds if bound)
            limit = f" Leaving cross-attention out altogether gives {limits}: what changes nothing else cannot gain more." if limits else ""
            return f"{where}: {label(row.arm)} runs {_comparisons(row, group.study)}.{limit}"
    return ""


def _weight(group: SpeedGroup) -> tuple[bool, int]:
    """Of groups with EMCA more than of others, then of large images."""
    return arm_named(group.study.arms, "emca") is not None, group.rows[0].pixels


def _bound(rows: Sequence[CountRow]) -> str:
    row = next((row for row in rows if row.arm in row.study.baselines and row.attention_share is not None), None)
    if row is None or row.bound is None or row.attention_share is None:
        return ""
    params = row.cell.params
    where = f"In multiply-adds, cross-attention is {row.attention_share:.1%} of {params['model']} at {numbers.size(params['image_size'])}"
    return f"{where}: making it free would save at most a factor of {row.bound:.2f}."


def _accuracy(group: AccuracyGroup) -> str:
    entry = group.arm(subject(group.study))
    if entry is None or entry.score is None:
        return ""
    seeds = numbers.plural(entry.score.count, "seed")
    text = f"On {group.dataset}, {label(entry.name)} reaches {numbers.points(entry.score)} {group.metric.label} ({seeds})"
    if entry.difference is not None and group.baseline:
        text += f", {numbers.points(entry.difference, signed=True)} against {label(group.baseline)}"
        text += f": {entry.verdict} by the margin of {group.study.margin:g}"
    text += "."
    if group.sensitivity == "cannot decide":
        text += f" But {group.dataset} cannot decide: without any cross-attention the model does as well within the margin."
    elif group.sensitivity != "can decide":
        text += f" Whether {group.dataset} can tell cross-attentions apart at all is undecided."
    return text


def _claims(found: Findings) -> str:
    if not found.claims:
        return ""
    counted = Counter(claim.verdict for claim in found.claims)
    order: tuple[Verdict, ...] = ("reproduced", "differs", "undecided", "not comparable", "not run")
    parts = ", ".join(f"{counted[verdict]} {verdict}" for verdict in order if counted[verdict])
    return f"Of {numbers.plural(len(found.claims), 'comparison')} with published claims: {parts}."


def _targets(found: Findings) -> str:
    if not found.targets:
        return ""
    counted = Counter(row.verdict for row in found.targets)
    order: tuple[TargetVerdict, ...] = ("met", "missed", "undecided", "not run")
    parts = ", ".join(f"{counted[verdict]} {verdict}" for verdict in order if counted[verdict])
    return f"Of {numbers.plural(len(found.targets), 'comparison')} with the project's own targets: {parts}."
