"""The report's sections in reading order, each from the findings alone; a part that was not planned or not run says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from emca_bench import stats
from emca_bench.report import figures, numbers, panoptic, tables
from emca_bench.report.accuracy import AccuracyGroup
from emca_bench.report.answer import answer
from emca_bench.report.arms import label, subject
from emca_bench.report.costs import RULE, cost_table, costs, recommend
from emca_bench.report.counts import CountRow
from emca_bench.report.diagnostics import diagnostics_table
from emca_bench.report.document import Block, Bullets, Code, Details, Document, Figure, Heading, Paragraph, Span, Strong, Text
from emca_bench.report.findings import Findings, trade_offs
from emca_bench.report.load import Run
from emca_bench.report.mechanism import mechanism_blocks
from emca_bench.report.method import method_notes
from emca_bench.report.operators import operator_blocks, target_blocks
from emca_bench.report.overlays import overlay
from emca_bench.report.segment_overlays import segment_overlay
from emca_bench.report.speed import SpeedGroup, SpeedRow, crossing, first_baseline, largest, without_attention
from emca_bench.report.together import together_blocks
from emca_bench.specs import Value
from emca_bench.stats import speed_verdict

TITLE = "EMCA in Mask2Former: speed, cost and accuracy"

_CONTENDED = "Other work held the same cores and threads waited for each other: run again on an idle machine, or with fewer threads."
_CURVES = "Left: latency of one call, with 95 % intervals as bands; rings: last crossing with each baseline."
_BOUND = "Measured bound: how many times as fast a baseline becomes without any cross-attention."
_BOUND_HOLDS = "An arm that changes nothing else cannot gain more."
_BLIND = "That an arm is not worse here would be true of deleting the module too."
_BAND = "Grey band: losses within the margin stated before the run. Dots: seeds. The table pairs seeds, which the bars cannot show."
_SHORT = "A short training ranks arms at equal effort; it says nothing about converged accuracy."


def document(found: Findings) -> Document:
    """The whole report."""
    arms = [arm.name for study in found.run.studies for arm in study.arms]
    palette = figures.looks(arms)
    with figures.style():
        blocks = [
            *_opening(found),
            *_conditions(found),
            *_claims(found),
            *target_blocks(found),
            *operator_blocks(found, palette),
            *_attention(found, palette),
            *_flops(found),
            *_speed(found, palette),
            *_accuracy(found, palette),
            *mechanism_blocks(found.run),
            *_overlays(found),
            *_troubles(found.run),
            *_commands(found.run),
            *method_notes(found.run),
        ]
    return Document(TITLE, blocks)


def _opening(found: Findings) -> list[Block]:
    blocks: list[Block] = [Paragraph(answer(found))]
    if found.run.quick:
        names = ", ".join(study.name for study in found.run.studies if study.quick)
        blocks.append(
            Paragraph(f"Quick run ({names}): fewer rounds, seeds or sizes than the full study. Do not cite these numbers.", "open")
        )
    for study in found.run.studies:
        tick = found.run.scheduler_tick(study)
        if tick is not None:
            blocks.append(Paragraph(f"Latencies of {study.name} are multiples of the scheduler tick ({tick:g} ms). {_CONTENDED}", "bad"))
    return blocks


def _conditions(found: Findings) -> list[Block]:
    run = found.run
    identity, state = run.environment.identity, run.environment.state
    rows: list[tuple[str, Text]] = [(_name(key), _shown(value)) for key, value in identity.items()]
    if state.get("git_commit"):
        dirty = " with uncommitted changes" if state.get("git_dirty") else ""
        rows.append(("commit", (Code(str(state["git_commit"])[:12]), dirty) if dirty else Code(str(state["git_commit"])[:12])))
    rows += [(_name(key), _shown(value)) for key, value in state.items() if key not in ("git_commit", "git_dirty")]
    measured = (*found.attention, *found.models, *(group.group for groups in found.kernels for group in groups))
    backends = {pair for group in measured for row in group.rows for pair in row.backends.items()}
    rows += [(f"backend of {op}", name) for op, name in sorted(backends)]
    rows += _said(run, "no_energy", "no energy")
    rounds = ", ".join(f"{study.name} {study.settings.rounds}" for study in run.studies if "latency" in study.measures)
    rows += [("rounds", rounds)] if rounds else []
    commands = run.environment.commands
    rows += [("context", Code(run.context)), ("commands" if len(commands) > 1 else "command", _coded(commands))]
    blocks: list[Block] = [Heading(2, "Conditions"), tables.conditions_table(rows)]
    if state.get("git_dirty"):
        blocks.append(Paragraph("The source tree had uncommitted changes: these numbers belong to no commit.", "open"))
    load, cores = state.get("load_average"), identity.get("cores")
    if isinstance(load, (int, float)) and isinstance(cores, int) and load > cores / 2:
        blocks.append(
            Paragraph(f"The machine was busy at the start: load average {load:g} on {cores} cores. Latencies may be too high.", "open")
        )
    if run.unused_records:
        said = f"{numbers.plural(run.unused_records, 'record')} of other contexts or of cells no longer planned are left out."
        blocks.append(Paragraph(said))
    return blocks


def _said(run: Run, value: str, name: str) -> list[tuple[str, Text]]:
    """A condition that the latencies of this run recorded."""
    words = dict.fromkeys(str(result.values[value]) for result in run.results.values() if value in result.values)
    return [(name, ", ".join(words))] if words else []


def _claims(found: Findings) -> list[Block]:
    heading = Heading(2, "Paper claims")
    if not found.claims:
        return [heading, Paragraph("The studies of this run hold no published claims.")]
    return [
        heading,
        tables.claims_table(found.claims),
        Paragraph(
            "Reproduced: the estimate lies within the tolerance of the published value, and its interval shows the effect. Differs: "
            "the whole interval lies outside of the tolerance. Undecided: too few repeats, or an interval that shows neither. "
            "Not comparable: other hardware or data."
        ),
    ]


def _attention(found: Findings, palette: dict[str, figures.Look]) -> list[Block]:
    blocks: list[Block] = [Heading(2, "Cross-attention alone")]
    if not found.attention:
        return [*blocks, Paragraph("This run plans no latency of the cross-attention alone.")]
    for index, group in enumerate(found.attention):
        blocks += _titled(group.study.question, group.shared, len(found.attention) > 1)
        if not any(row.latency_ms for row in group.rows):
            blocks += [Paragraph("No latency has been measured yet.", "open"), tables.attention_table(group)]
            continue
        name = subject(group.study)
        caption = f"{_CURVES} Right: speedup over the last-named baseline."
        files = figures.files(figures.latency_over_pixels(group, palette, name))
        blocks.append(Figure(f"attention-{group.study.name}-{index + 1}", "Latency of one cross-attention over pixels", caption, files))
        blocks += [Bullets(lines)] if (lines := _crossings(group, name)) else []
        blocks.append(tables.attention_table(group))
    return blocks


def _crossings(group: SpeedGroup, name: str | None) -> list[Text]:
    lines: list[Text] = []
    row = largest(group, name) if name else None
    if name is None or row is None:
        return lines
    for baseline in group.study.baselines:
        ratio = row.speedups.get(baseline)
        pixels = crossing(group, name, baseline)
        if ratio is None:
            continue
        at_most = f"at {numbers.size(row.cell.params['pixels'])} pixels {numbers.ratio(ratio)} ({speed_verdict(ratio)})"
        if pixels is None:
            side = "faster" if ratio.estimate > 1 else "slower"
            lines.append((Code(name), f" against {label(baseline)}: {side} at every measured size, no crossover; {at_most}."))
        else:
            lines.append((Code(name), f" against {label(baseline)}: crossover at about {pixels:.0f} pixels (interpolated); {at_most}."))
    return lines


def _flops(found: Findings) -> list[Block]:
    blocks: list[Block] = [Heading(2, "Multiply-adds")]
    counted = [row for group in found.model_counts for row in group if row.macs is not None]
    if not found.model_counts:
        blocks.append(Paragraph("This run plans no counts of whole models."))
    else:
        params = [row.cell.params for group in found.model_counts for row in group]
        shared = {
            name: value
            for name, value in params[0].items()
            if name not in ("dtype", "device") and all(p.get(name) == value for p in params)
        }
        said = "Multiply-adds of one forward pass (1 MAC = 2 FLOPs), counted on shapes alone: exact, no interval."
        blocks.append(Paragraph(f"{said} Conditions: {numbers.conditions(shared)}."))
        if any(row.components for row in counted):
            with_components = [[row for row in group if row.components] for group in found.model_counts]
            files = figures.files(figures.macs_by_component([group for group in with_components if group]))
            blocks.append(
                Figure(
                    "macs",
                    "Multiply-adds by component",
                    "Multiply-adds by component. Numbers: total, and share of the cross-attention.",
                    files,
                )
            )
        blocks += [Bullets(lines)] if (lines := [line for group in found.model_counts if (line := _count_bound(group))]) else []
        blocks.append(tables.counts_table(found.model_counts))
    checked = [row for row in (*found.attention_counts, *counted) if row.macs is not None]
    if checked:
        blocks.append(Details("Counter against closed form", [tables.cross_check_table(checked)]))
    if any(row.by_fvcore for row in checked):
        said = "Most papers count with fvcore: it counts norms, resizes and samples, and drops attention scores that it does not know."
        blocks.append(Details("Beside fvcore, the counter of most papers", [Paragraph(said), tables.counters_table(checked)]))
    return blocks


def _count_bound(group: Sequence[CountRow]) -> Text | None:
    row = next((row for row in group if row.arm in row.study.baselines and row.macs and row.components), None)
    if row is None or row.attention_share is None or row.bound is None:
        return None
    params = row.cell.params
    where = f"{params['model']} at {numbers.size(params['image_size'])}, {label(row.arm)}: "
    return (
        where,
        Strong(f"at most {row.attention_share:.1%}"),
        f" fewer multiply-adds (a factor of {row.bound:.2f}) even if cross-attention were free.",
    )


def _speed(found: Findings, palette: dict[str, figures.Look]) -> list[Block]:
    blocks: list[Block] = [Heading(2, "Frames per second")]
    if not found.models:
        return [*blocks, Paragraph("This run plans no latency of decoders or models.")]
    blocks.append(
        Paragraph("Weights are random and images are noise, the same for all arms; rows say what a call takes, not what it finds.")
    )
    studies: dict[str, list[SpeedGroup]] = {}
    for group in found.models:
        studies.setdefault(group.study.name, []).append(group)
    for name, groups in studies.items():
        blocks += _titled(groups[0].study.question, _common(groups), len(studies) > 1)
        if any(row.latency_ms for group in groups for row in group.rows):
            used = set(map(first_baseline, groups))
            against = [label(name) for name in groups[0].study.baselines if name in used]
            numbers_of = f" Numbers: speedup over {', or where it is missing over '.join(against)}." if against else ""
            dashed = "; dashed: the arm without cross-attention" if any(map(without_attention, groups)) else ""
            caption = f"Latency with 95 % interval, batch included{dashed}.{numbers_of}"
            blocks.append(
                Figure(f"speed-{name}", "Latency by scope and arm", caption, figures.files(figures.latency_by_scope(groups, palette)))
            )
        blocks.append(tables.speed_table(groups))
        bounds = tables.bounds_table(groups)
        if bounds is not None:
            blocks += [Paragraph(f"{_BOUND} {_BOUND_HOLDS}"), bounds]
    return blocks


def _accuracy(found: Findings, palette: dict[str, figures.Look]) -> list[Block]:
    blocks: list[Block] = [Heading(2, "Accuracy")]
    if not found.accuracy:
        return [*blocks, Paragraph("This run plans no training.")]
    for index, group in enumerate(found.accuracy, start=1):
        blocks.append(Heading(3, group.label))
        blocks += _accuracy_group(found, group, palette, f"{group.dataset}-{index}")
    return blocks


def _accuracy_group(found: Findings, group: AccuracyGroup, palette: dict[str, figures.Look], name: str) -> list[Block]:
    blocks: list[Block] = [_sensitivity(group), Paragraph(_trained(group))]
    panoptic_task = group.task == "panoptic"
    table = panoptic.panoptic_table(group) if panoptic_task else tables.accuracy_table(group)
    if not group.measured:
        return [*blocks, table]
    blocks += [panoptic.rules(group)] if panoptic_task else []
    caption = _BAND + (f" {panoptic.conditions(group)}" if panoptic_task else "")
    blocks.append(
        Figure(
            f"accuracy-{name}",
            f"{_metric_names(group)} by arm on {group.dataset}",
            caption,
            figures.files(figures.accuracy_by_arm(group, palette)),
        )
    )
    blocks.append(table)
    blocks += together_blocks(group, palette, name)
    rows = costs(found.models, group)
    beside = cost_table(group, rows)
    if beside is not None:
        blocks += [beside, _recommendation(group, rows)]
    cost, entries = trade_offs(found, group)
    if entries:
        drawn = figures.accuracy_over_latency(entries, palette, cost=cost, metric=group.metric.label, title=group.label)
        caption = f"Accuracy against latency. Bars: 95 % intervals. Horizontal axis: {cost}."
        blocks.append(Figure(f"pareto-{name}", f"{group.metric.label} against latency on {group.dataset}", caption, figures.files(drawn)))
    blocks += panoptic.panoptic_details(group) if panoptic_task else []
    looked = diagnostics_table(group)
    blocks += [] if looked is None else [Details("Where the queries look, layer by layer", [looked])]
    blocks.append(Details("IoU of every class", [tables.class_table(group)]))
    training: list[Block] = [tables.training_table(group)]
    curves = figures.loss_curves(group, palette)
    if curves is not None:
        caption = "Thin: each seed as recorded. Bold: running mean over seeds."
        training.append(Figure(f"loss-{name}", f"Training loss on {group.dataset}", caption, figures.files(curves)))
    return [*blocks, Details("What was trained for how long", training)]


def _recommendation(group: AccuracyGroup, rows: dict[str, SpeedRow]) -> Paragraph:
    chosen = recommend(group, rows)
    if chosen.arm is None:
        return Paragraph(f"No arm is recommended: {chosen.reason}. {RULE}", "open")
    return Paragraph(("Recommended: ", Code(chosen.arm), f" ({chosen.reason}). {RULE}"), "good")


def _metric_names(group: AccuracyGroup) -> str:
    return ", ".join(metric.label for metric in group.metrics if metric.key in figures.DRAWN)


def _sensitivity(group: AccuracyGroup) -> Paragraph:
    margin = f"the margin of {group.study.margin:g} {group.metric.label}"
    if not group.same_images:
        said = f"The files of {group.dataset} changed between the cells of this comparison, so nothing is compared: train all anew."
        return Paragraph(said, "bad")
    if group.signal is None or group.baseline is None:
        said = "Without finished runs of both the baseline and the arm none, nothing tells whether this data set can rank cross-attentions."
        return Paragraph(said, "open")
    lost = f"taking the cross-attention away costs {_cost(group)} {group.metric.label} ({numbers.plural(group.signal.count, 'seed')})"
    if group.sensitivity == "can decide":
        return Paragraph(f"{group.dataset} can tell cross-attentions apart: {lost}, more than {margin}.", "good")
    if group.sensitivity == "cannot decide":
        return Paragraph(f"{group.dataset} cannot decide: {lost}, no more than {margin}. {_BLIND}", "bad")
    few = ", and one seed is never a verdict" if group.signal.count < stats.MIN_SEEDS else ""
    return Paragraph(f"Whether {group.dataset} can tell cross-attentions apart is undecided: {lost}, against {margin}{few}.", "open")


def _cost(group: AccuracyGroup) -> str:
    assert group.signal is not None
    return numbers.points(group.signal, signed=True).removeprefix("+")


def _trained(group: AccuracyGroup) -> str:
    if not group.measured:
        return "Nothing has been trained yet."
    images = f"{group.fact('train_images')} training and {group.fact('test_images')} test images"
    steps = (
        f"{group.fact('train_steps')} steps of batch {group.shared.get('batch', '?')} at {numbers.size(group.fact('image_size') or '?')}"
    )
    pretrained = group.fact("pretrained") or "nothing"
    return f"Trained from {pretrained} for {steps}, {images}. {_SHORT}"


def _overlays(found: Findings) -> list[Block]:
    blocks: list[Block] = []
    for index, group in enumerate(found.accuracy, start=1):
        paint = segment_overlay if group.task == "panoptic" else overlay
        picture = paint(found.run.folder, group)
        if picture is not None:
            shown = numbers.plural(picture.images, "test image")
            what = panoptic.shown_rule(group) if group.task == "panoptic" else "Errors below each prediction."
            caption = f"{shown} of {group.dataset}, seed {picture.seed}, not chosen by result. {what}"
            blocks += [Heading(3, f"Predictions on {group.label}")]
            blocks.append(Figure(f"overlay-{group.dataset}-{index}", f"Predictions on {group.dataset}", caption, {"png": picture.png}))
    return [Heading(2, "Qualitative results"), *blocks] if blocks else []


def _troubles(run: Run) -> list[Block]:
    heading = Heading(2, "Failed, impossible and missing cells")
    troubled = [result for result in run.results.values() if result.status in ("failed", "impossible", "partial")]
    missing = [result for result in run.results.values() if result.status == "not run"]
    if not troubled and not missing:
        return [heading, Paragraph(f"None: all {run.count()} planned measurements are complete.")]
    blocks: list[Block] = [heading, tables.trouble_table(troubled)] if troubled else [heading]
    if missing:
        summary = f"{numbers.plural(len(missing), 'planned measurement')} not run"
        blocks.append(Details(summary, [tables.trouble_table(missing)]))
    return blocks


def _commands(run: Run) -> list[Block]:
    blocks: list[Block] = [Heading(2, "How each row was produced")]
    if run.environment.commands:
        blocks.append(Paragraph(("The whole run: ", *_coded(run.environment.commands), ". A single cell:")))
    for study in run.studies:
        table = tables.commands_table(study)
        blocks.append(Details(f"{study.name}: {numbers.plural(len(table.rows), 'cell')}", [table]))
    return blocks


def _titled(question: str, shared: Mapping[str, Value], numbered: bool) -> list[Block]:
    where = numbers.conditions(shared)
    heading: list[Block] = [Heading(3, where.capitalize())] if numbered else []
    return [*heading, Paragraph((Strong(question), f" Conditions: {where}."))]


def _common(groups: Sequence[SpeedGroup]) -> dict[str, Value]:
    first = groups[0].shared
    return {name: value for name, value in first.items() if all(group.shared.get(name) == value for group in groups)}


def _name(key: str) -> str:
    # those in capitals are variables of the environment
    return key if key.isupper() else key.replace("_", " ")


def _coded(commands: Sequence[str]) -> tuple[Span, ...]:
    return tuple(span for command in commands for span in (", ", Code(command)))[1:]


def _shown(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
