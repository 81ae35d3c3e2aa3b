"""The command line. Exit codes: 0 done, 1 a cell failed or a check did not hold, 2 input that cannot be used, 130 interrupted."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emca_bench.errors import UsageError, did_you_mean, listing

if TYPE_CHECKING:
    from emca_bench.progress import Progress
    from emca_bench.specs import Cell, Study

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

DEFAULT_RUNS = Path("reports/local")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.verb(arguments, argv)
    except UsageError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        return _complain(f"cannot write {error.filename or 'to the output folder'}: {error.strerror}; what was measured before is kept")


def build_parser() -> argparse.ArgumentParser:
    """All verbs and flags; a test freezes them."""
    parser = argparse.ArgumentParser(
        prog="emca-bench", description="Benchmark and ablations of efficient masked cross-attention (EMCA) in Mask2Former."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, function: Callable[[argparse.Namespace, list[str]], int], text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(verb=function)
        return sub

    sub = verb("ls", list_names, "list what can be named: studies, attentions, models, datasets, parameters")
    sub.add_argument("what", nargs="?", default="all", choices=["all", *LISTINGS])
    sub = verb("validate", validate, "check study files without measuring")
    sub.add_argument("study", nargs="+", help="name in ablations/ or path of a TOML file")
    sub = verb("plan", plan, "show what a run would measure and what its folder already holds")
    _add_study_arguments(sub)
    sub.add_argument("--threads", type=int, help="threads of torch that the run would have, all cores by default")
    _add_device(sub)
    sub = verb("run", run, "measure a study, or resume it, and write its report")
    _add_study_arguments(sub)
    sub.add_argument("--jobs", type=int, default=1, help="cells at once, on CUDA all on one GPU; what is timed still comes alone")
    sub.add_argument("--threads", type=int, help="threads of torch for each cell; all cores by default, shared by the jobs")
    _add_device(sub)
    sub = verb("train", train, "train the cells of a study and nothing else, under torchrun in several processes; run scores them")
    _add_study_arguments(sub)
    _add_device(sub)
    sub.add_argument("--tensorboard", type=Path, help="folder for curves, a folder below it for each cell")
    sub = verb("feed", feed, "time a study's training steps and its loader processes: do the images keep up?")
    _add_study_arguments(sub, out=False)
    _add_device(sub)
    sub.add_argument("--processes", default="1,2,4,8", metavar="N,N,...", help="numbers of loader processes, 1,2,4,8 by default")
    sub.add_argument("--seconds", type=float, default=10.0, help="for which a loader is watched, 10 by default")
    sub = verb("report", report, "render the report of a run folder")
    sub.add_argument("run", type=Path, help="run folder")
    sub.add_argument("--out", type=Path, help="folder of the report, the run folder by default")
    sub.add_argument("--readme", type=Path, help="update the generated blocks of this Markdown file too")
    sub.add_argument("--accuracies", type=Path, metavar="RUN", help="run folder that --readme takes accuracies from, if it is another")
    sub.add_argument("--check", action="store_true", help="write nothing; exit 1 if files on disk differ from what would be rendered")
    sub = verb("compare", compare, "compare the latencies of two runs cell by cell")
    sub.add_argument("runs", type=Path, nargs=2, metavar="RUN")
    sub = verb("convert", convert, "write a checkpoint in another format or under other names")
    sub.add_argument("source", type=Path, help=".pkl (detectron2), .pth, .pt, .bin, .safetensors, or a Hugging Face folder")
    sub.add_argument("target", type=Path, help="file to write; its suffix says the format: .pkl, .pth, .pt, .bin or .safetensors")
    sub.add_argument("--names", choices=["original", "transformers"], default="original", help="whose parameter names the target has")
    sub = verb("data", data, "check a data set, or show what a model will be trained on")
    sub.add_argument("do", choices=["check", "preview"])
    sub.add_argument("path", type=Path, help="folder of the data set")
    sub.add_argument("--layout", help="its layout, found by its files by default: see docs/datasets.md")
    sub.add_argument("--limit", type=int, default=0, help="check: images of each split to read, all by default")
    sub.add_argument("--out", type=Path, help="preview: PNG file to write")
    sub.add_argument("--split", default="train", help="preview: train by default")
    sub.add_argument("--crop", default="384x384", help="preview: HxW of the training crops")
    sub.add_argument("--seed", type=int, default=0, help="preview: another seed shows other crops")
    sub = verb("export", export, "write a model as ONNX (.onnx) or as a program of torch (.pt2), of standard operators alone")
    sub.add_argument("model", help="name in the model registry")
    sub.add_argument("--out", type=Path, required=True, help="file to write; its suffix says the format")
    sub.add_argument("--weights", type=Path, help="checkpoint to load, random weights without it")
    sub.add_argument("--classes", type=int, default=150, help="classes of the model, 150 by default")
    sub.add_argument("--attention", default="masked_fused", help="name in the attention registry, masked_fused by default")
    sub.add_argument("--size", default="512x512", help="HEIGHTxWIDTH of the images, 512x512 by default")
    sub.add_argument("--batch", type=int, default=1, help="images of a call, 1 by default")
    sub = verb("env", environment, "show the environment that a measurement would record")
    sub.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser


def _add_study_arguments(parser: argparse.ArgumentParser, *, out: bool = True) -> None:
    parser.add_argument("study", help="name in ablations/ or path of a TOML file")
    parser.add_argument("--quick", action="store_true", help="the study's [quick] table: every path in minutes, no verdicts")
    parser.add_argument("--only", action="append", default=[], metavar="KEY=VALUE", help="only cells with this arm or parameter")
    if out:
        parser.add_argument("--out", type=Path, help=f"run folder, {DEFAULT_RUNS}/STUDY by default")
    else:
        parser.set_defaults(out=None)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], help="by default what the study says")


def _complain(message: str) -> int:
    print(f"emca-bench: {message}", file=sys.stderr)
    return USAGE


def _load(arguments: argparse.Namespace) -> tuple[list[Study], list[Study], Path]:
    """The studies to measure now, the whole studies, and the run folder."""
    from emca_bench.specs import find_study, load_studies

    path = find_study(arguments.study)
    whole = load_studies(path, quick=arguments.quick)
    quick = "-quick" if arguments.quick else ""
    return [study.only(_conditions(arguments)) for study in whole], whole, arguments.out or DEFAULT_RUNS / f"{path.stem}{quick}"


def _conditions(arguments: argparse.Namespace) -> dict[str, str]:
    """What --only asks for."""
    conditions = {}
    for condition in arguments.only:
        name, equals, value = condition.partition("=")
        if not equals:
            raise UsageError(f"--only {condition!r} is not of the form KEY=VALUE")
        conditions[name] = value
    return conditions


def _trainings(arguments: argparse.Namespace, part: Sequence[Study]) -> tuple[list[Cell], str]:
    """The cells that train on images and their device, once device and data are known to be there."""
    from emca_bench.environment import check_device
    from emca_bench.measure.accuracy import check_data
    from emca_bench.runner import device_of, on_device

    device = arguments.device or device_of(part)
    check_device(device)
    cells = [cell for study in on_device(part, device) if "accuracy" in study.measures for cell in study.cells()]
    if not cells:
        raise UsageError(f"study {arguments.study!r} trains nothing; expected one with the measure 'accuracy'")
    for cell in {(cell.arm.name, cell.params["dataset"]): cell for cell in cells}.values():
        check_data(cell.params)
    return cells, device


def _list_studies() -> list[tuple[str, str]]:
    from emca_bench.specs import load_studies, study_folders

    paths = {path.stem: path for folder in reversed(study_folders()) for path in folder.glob("*.toml")}
    rows = []
    for name, path in sorted(paths.items()):
        studies = load_studies(path)
        one = all(study.name.startswith(studies[0].name) for study in studies)
        rows.append((name, studies[0].question if one else "all of " + ", ".join(study.name for study in studies)))
    return rows


def _list_attentions() -> list[tuple[str, str]]:
    from emca_bench.models import ATTENTIONS

    return [(name, _first_line(ATTENTIONS[name])) for name in ATTENTIONS]


def _list_models() -> list[tuple[str, str]]:
    from emca_bench.models import MODELS

    return [(name, MODELS[name].about) for name in MODELS]


def _list_datasets() -> list[tuple[str, str]]:
    from emca_bench.data import DATASETS

    return [(name, _first_line(DATASETS[name])) for name in DATASETS]


def _list_parameters() -> list[tuple[str, str]]:
    from emca_bench.specs import PARAMETERS

    return [(name, f"{kind.__name__}: {meaning}") for name, (kind, meaning) in PARAMETERS.items()]


LISTINGS: dict[str, Callable[[], list[tuple[str, str]]]] = {
    "studies": _list_studies,
    "attentions": _list_attentions,
    "models": _list_models,
    "datasets": _list_datasets,
    "parameters": _list_parameters,
}


def _first_line(target: object) -> str:
    return (target.__doc__ or "").strip().split("\n")[0]


def list_names(arguments: argparse.Namespace, argv: list[str]) -> int:
    """`emca-bench ls`."""
    for what, entries in LISTINGS.items():
        if arguments.what in ("all", what):
            print(f"{what}:")
            for name, text in entries():
                print(f"  {name:22} {text}")
    return OK


def validate(arguments: argparse.Namespace, argv: list[str]) -> int:
    """`emca-bench validate`."""
    from emca_bench.specs import find_study, load_studies

    for name in arguments.study:
        path = find_study(name)
        for quick in (False, True):
            for study in load_studies(path, quick=quick):
                _check_names(study)
                print(f"{path}: {study.name}{' (quick)' if study.quick else ''}: {len(study.cells())} cells, {', '.join(study.measures)}")
    return OK


def _check_names(study: Study) -> None:
    from emca_bench.data import DATASETS
    from emca_bench.measure.subjects import check_arm

    checked = set()
    for cell in study.cells():
        names = (cell.arm.name, *(cell.params.get(name) for name in ("model", "scope", "op", "pass")))
        if names not in checked:
            checked.add(names)
            check_arm(cell.arm, cell.params)
        if "dataset" in cell.params and cell.params["dataset"] not in DATASETS:
            name = str(cell.params["dataset"])
            raise UsageError(f"unknown dataset {name!r}{did_you_mean(name, DATASETS)}; known: {listing(DATASETS)}")


def plan(arguments: argparse.Namespace, argv: list[str]) -> int:
    """`emca-bench plan`."""
    from emca_bench.environment import collect_environment, default_threads
    from emca_bench.progress import clock
    from emca_bench.records import read_records
    from emca_bench.runner import RECORDS, device_of, finished_slots, on_device
    from emca_bench.runner import plan as plan_tasks

    _at_least_one("--threads", arguments.threads)
    part, _, folder = _load(arguments)
    device = arguments.device or device_of(part)
    records = read_records(folder / RECORDS)
    # without records nothing is done under any conditions, and torch stays out
    context = collect_environment(threads=arguments.threads or default_threads(), device=device)["context"] if records else ""
    done = finished_slots(records)
    seconds = {record.key: record.duration_s for record in records}
    tasks = plan_tasks(on_device(part, device))
    todo = [task for task in tasks if (context, task.key, task.round) not in done]
    known = [seconds[task.key] for task in todo if task.key in seconds]
    for cell, measure in dict.fromkeys((task.cell.label(), task.measure) for task in tasks):
        print(f"{measure:9} {cell}")
    estimate = (
        clock(sum(known)) if len(known) == len(todo) else f"at least {clock(sum(known))}" if known else "unknown before the first run"
    )
    print(f"{len(tasks)} measurements, {len(tasks) - len(todo)} done in {folder}, {len(todo)} to do; time: {estimate}")
    return OK


def run(arguments: argparse.Namespace, argv: list[str]) -> int:
    """`emca-bench run`."""
    from emca_bench import runner
    from emca_bench.workers import ALONE

    _at_least_one("--threads", arguments.threads)
    _at_least_one("--jobs", arguments.jobs)
    part, whole, folder = _load(arguments)
    command = shlex.join(["emca-bench", *argv])
    timed = any(measure in ALONE for study in part for measure in study.measures)
    if arguments.jobs > 1 and arguments.threads is None and timed:
        threads = runner.threads_of_each(arguments.jobs)
        print(f"{' and '.join(ALONE)} come alone, with threads = {threads} as all else here; --threads sets another", file=sys.stderr)
    # a polite kill (timeout, a batch system) leaves as Ctrl-C does: the measuring process stopped, the way to resume said
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        outcome = runner.run(
            part,
            folder,
            whole=whole,
            threads=arguments.threads,
            device=arguments.device,
            jobs=arguments.jobs,
            command=_portable(arguments),
        )
    except KeyboardInterrupt:
        print(f"\ninterrupted; every finished measurement is in {folder}. To resume: {command}", file=sys.stderr)
        return INTERRUPTED
    print(
        f"measured {outcome.measured}, already there {outcome.skipped}, impossible {outcome.impossible}, failed {outcome.failed}",
        file=sys.stderr,
    )
    _render(folder, folder)
    return FAILED if outcome.failed else OK


def _at_least_one(flag: str, found: int | None) -> None:
    if found is not None and found < 1:
        raise UsageError(f"{flag} {found}: expected at least 1")


def train(arguments: argparse.Namespace, argv: list[str]) -> int:
    """`emca-bench train`."""
    from emca_bench.measure.training import train_cell
    from emca_bench.progress import Progress
    from emca_bench.records import RecordWriter
    from emca_bench.runner import RECORDS, checkpoint_path, prepare
    from emca_bench.train import Processes

    part, _, folder = _load(arguments)
    cells, device = _trainings(arguments, part)
    scored = _scored(folder, device)
    cells = [cell for cell in cells if cell.key("accuracy") not in scored]
    processes = Processes(device)
    prepare(folder)
    # as run does, which writes the same checkpoints
    lock = RecordWriter(folder / RECORDS) if processes.first else contextlib.nullcontext()
    with lock, Progress([("train", cell.key("accuracy")) for cell in cells], stream=None if processes.first else io.StringIO()) as progress:
        for cell in cells:
            key, steps = cell.key("accuracy"), int(cell.params["steps"])
            progress.start("train", key, f"train {cell.label()}")
            train_cell(
                cell.arm,
                cell.params,
                checkpoint=checkpoint_path(folder, key),
                tensorboard=arguments.tensorboard and arguments.tensorboard / f"{cell.arm.name}-{cell.params['seed']}-{key}",
                processes=processes,
                on_step=partial(_show_step, progress, key, steps),
            )
            progress.finish(key)
    if processes.first:
        count = f"{len(cells)} cell{'' if len(cells) == 1 else 's'}"
        print(f"trained: {count} in {folder}. To score: {shlex.join(['emca-bench', 'run', *_same_run(argv)])}")
    processes.end()
    return OK


def feed(arguments: argparse.Namespace, argv: list[str]) -> int:
    """`emca-bench feed`: of each data set, the first cell of the study."""
    from emca_bench.measure.feeding import TOLERATED, describe, measure_feeding

    counts = _counts(arguments.processes)
    part, _, _ = _load(arguments)
    first = {cell.params["dataset"]: cell for cell in reversed(_trainings(arguments, part)[0])}
    starved = False
    for cell in reversed(first.values()):
        own = int(cell.params.get("loader_workers", 0))
        feeding = measure_feeding(
            cell.arm,
            cell.params,
            processes=sorted({own, *counts}),
            seconds=arguments.seconds,
            on_loader=lambda count: print(f"{count} loader processes ...", file=sys.stderr),
        )
        print("\n".join(describe(feeding, cell.label(), own=own)))
        starved |= feeding.waiting(own) > TOLERATED
    return FAILED if starved else OK


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [-1]
    if min(counts) < 0:
        raise UsageError(f"--processes {text!r}: expected numbers, 0 for none, separated by commas, for example 1,2,4,8")
    return counts


def _scored(folder: Path, device: str) -> set[str]:
    """Keys of the cells whose record is there, from this machine and source, with any number of threads."""
    from emca_bench.environment import collect_environment, default_threads
    from emca_bench.records import read_records
    from emca_bench.runner import ENVIRONMENT, RECORDS, finished_slots, known_environments

    def but_threads(environment: Mapping[str, Any]) -> dict[str, Any]:
        return {**environment["identity"], "threads": None}

    here = but_threads(collect_environment(threads=default_threads(), device=device))
    alike = {context for context, entry in known_environments(folder / ENVIRONMENT).items() if but_threads(entry) == here}
    return {key for context, key, _ in finished_slots(read_records(folder / RECORDS)) if context in alike}


def _show_step(progress: Progress, key: str, steps: int, step: int, loss: float) -> None:
    progress.update(key, step / steps, f"step {step}/{steps}, loss {loss:.2f}")


def _same_run(argv: Sequence[str]) -> list[str]:
    """The arguments of `train` that `run` takes too."""
    words = list(argv[1:])
    for index, word in enumerate(words):
        if word == "--tensorboard":
            return words[:index] + words[index + 2 :]
    return [word for word in words if not word.startswith("--tensorboard=")]


def _portable(arguments: argparse.Namespace) -> str:
    """The command for the record: without paths of this machine."""
    words = ["emca-bench", "run", Path(arguments.study).stem, *(["--quick"] if arguments.quick else [])]
    words += [word for condition in arguments.only for word in ("--only", condition)]
    if arguments.threads:
        words += ["--threads", str(arguments.threads)]
    if arguments.jobs > 1:
        words += ["--jobs", str(arguments.jobs)]
    if arguments.device:
        words += ["--device", arguments.device]
    return shlex.join(words)


def _render(folder: Path, out: Path) -> None:
    from emca_bench.report.build import render

    rendered = render(folder, out)
    print(f"report: {rendered.markdown_path}\nreport: {rendered.html_path}")


def report(arguments: argparse.Namespace, argv: list[str]) -> int:
    """`emca-bench report`."""
    from emca_bench.report.check import stale_files
    from emca_bench.report.readme import update_readme

    out = arguments.out or arguments.run
    if arguments.accuracies and not arguments.readme:
        raise UsageError("--accuracies says where --readme takes accuracies from: give --readme too")
    if arguments.check:
        stale = stale_files(arguments.run, out, readme=arguments.readme, accuracy_dir=arguments.accuracies)
        for path in stale:
            print(f"differs from what would be rendered: {path}")
        return FAILED if stale else OK
    _render(arguments.run, out)
    if arguments.readme:
        update_readme(arguments.readme, arguments.run, arguments.accuracies)
        print(f"updated: {arguments.readme}")
    return OK


def compare(arguments: argparse.Namespace, argv: list[str]) -> int:
    """`emca-bench compare`."""
    from emca_bench.report.compare import compare_runs

    print(compare_runs(*arguments.runs))
    return OK


def convert(arguments: argparse.Namespace, argv: list[str]) -> int:
    """`emca-bench convert`."""
    from emca_bench.models import checkpoints

    print(checkpoints.convert(arguments.source, arguments.target, names=arguments.names))
    return OK


def data(arguments: argparse.Namespace, argv: list[str]) -> int:
    """`emca-bench data`."""
    return _check_data(arguments) if arguments.do == "check" else _preview_data(arguments)


def _check_data(arguments: argparse.Namespace) -> int:
    from emca_bench.data.check import check_folder, describe

    def on_image(what: str, done: int, total: int) -> None:
        if done == total or done % 500 == 0:
            print(f"{what}: {done}/{total}", file=sys.stderr)

    if arguments.limit < 0:
        raise UsageError(f"--limit {arguments.limit}: expected 0 for all, or a number of images")
    checks = check_folder(arguments.path, layout=arguments.layout, limit=arguments.limit, on_image=on_image)
    for check in checks:
        print("\n".join(describe(check)))
    problems = sum(len(check.problems) for check in checks)
    print(f"{problems or 'no'} problem{'' if problems == 1 else 's'}")
    return FAILED if problems else OK


def _preview_data(arguments: argparse.Namespace) -> int:
    from emca_bench.data.layouts import layouts_of, open_split
    from emca_bench.specs import parse_size
    from emca_bench.train.preview import preview
    from emca_bench.train.recipe import Recipe

    if arguments.out is None or arguments.out.suffix.lower() != ".png":
        raise UsageError(f"--out {arguments.out}: expected the PNG file to write")
    # of several layouts of the same images, the one with segments shows more
    layout = layouts_of(arguments.path, arguments.layout)[-1]
    dataset = open_split(arguments.path, layout, arguments.split)
    task = "semantic" if dataset[0].panoptic is None else "panoptic"
    recipe = Recipe(steps=1, batch=min(4, len(dataset)), crop=parse_size(arguments.crop, what="--crop"), seed=arguments.seed)
    preview(dataset, dataset.classes, recipe, task).save(arguments.out)
    print(f"{layout} {arguments.split}, {task}: {arguments.out}")
    return OK


def export(arguments: argparse.Namespace, argv: list[str]) -> int:
    """`emca-bench export`."""
    from emca_bench.deploy.export import check_path, export
    from emca_bench.models import build_model, load_checkpoint
    from emca_bench.specs import parse_size

    size = parse_size(arguments.size, what="--size")
    for flag, found in (("--batch", arguments.batch), ("--classes", arguments.classes)):
        if found < 1:
            raise UsageError(f"{flag} {found}: expected at least 1")
    check_path(arguments.out)
    model = build_model(arguments.model, num_classes=arguments.classes, attention=arguments.attention)
    if arguments.weights:
        print(load_checkpoint(model, arguments.weights))
    export(model, arguments.out, size=size, batch=arguments.batch)
    print(f"written: {arguments.out}")
    return OK


def environment(arguments: argparse.Namespace, argv: list[str]) -> int:
    """`emca-bench env`."""
    import json

    from emca_bench.environment import collect_environment, default_threads

    print(json.dumps(collect_environment(threads=default_threads(), device=arguments.device), indent=1))
    return OK
