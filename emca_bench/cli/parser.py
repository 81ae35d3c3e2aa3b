"""All verbs and flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from emca_bench.cli.common import DEFAULT_RUNS
from emca_bench.cli.data import data
from emca_bench.cli.models import convert, export
from emca_bench.cli.reports import compare, environment, report
from emca_bench.cli.running import feed, run, train
from emca_bench.cli.studies import LISTINGS, list_names, plan, validate

Verb = Callable[[argparse.Namespace, list[str]], int]
"""From the arguments, and the words that they were, to an exit code."""

AddVerb = Callable[[str, Verb, str], argparse.ArgumentParser]
"""Adds a verb by its name, what carries it out, and a line of help; its flags come after."""


def build_parser() -> argparse.ArgumentParser:
    """All verbs and flags; a test freezes them."""
    parser = argparse.ArgumentParser(
        prog="emca-bench", description="Benchmark and ablations of efficient masked cross-attention (EMCA) in Mask2Former."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def add(name: str, function: Verb, text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(verb=function)
        return sub

    _add_studies(add)
    _add_running(add)
    _add_reports(add)
    _add_models(add)
    _add_data(add)
    return parser


def _add_studies(add: AddVerb) -> None:
    verb = add("ls", list_names, "list what can be named: studies, attentions, models, datasets, parameters")
    verb.add_argument("what", nargs="?", default="all", choices=["all", *LISTINGS])
    verb = add("validate", validate, "check study files without measuring")
    verb.add_argument("study", nargs="+", help="name in ablations/ or path of a TOML file")
    verb = add("plan", plan, "show what a run would measure and what its folder already holds")
    _add_study_arguments(verb)
    verb.add_argument("--threads", type=int, help="threads of torch that the run would have, all cores by default")
    _add_device(verb)


def _add_running(add: AddVerb) -> None:
    verb = add("run", run, "measure a study, or resume it, and write its report")
    _add_study_arguments(verb)
    verb.add_argument("--jobs", type=int, default=1, help="cells at once, on CUDA all on one GPU; what is timed still comes alone")
    verb.add_argument("--threads", type=int, help="threads of torch for each cell; all cores by default, shared by the jobs")
    _add_device(verb)
    verb = add("train", train, "train the cells of a study and nothing else, under torchrun in several processes; run scores them")
    _add_study_arguments(verb)
    _add_device(verb)
    verb.add_argument("--tensorboard", type=Path, help="folder for curves, a folder below it for each cell")
    verb = add("feed", feed, "time a study's training steps and its loader processes: do the images keep up?")
    _add_study_arguments(verb, out=False)
    _add_device(verb)
    verb.add_argument("--processes", default="1,2,4,8", metavar="N,N,...", help="numbers of loader processes, 1,2,4,8 by default")
    verb.add_argument("--seconds", type=float, default=10.0, help="for which a loader is watched, 10 by default")


def _add_reports(add: AddVerb) -> None:
    verb = add("report", report, "render the report of a run folder")
    verb.add_argument("run", type=Path, help="run folder")
    verb.add_argument("--out", type=Path, help="folder of the report, the run folder by default")
    verb.add_argument("--readme", type=Path, help="update the generated blocks of this Markdown file too")
    verb.add_argument("--accuracies", type=Path, metavar="RUN", help="run folder that --readme takes accuracies from, if it is another")
    verb.add_argument("--check", action="store_true", help="write nothing; exit 1 if files on disk differ from what would be rendered")
    verb = add("compare", compare, "compare the latencies of two runs cell by cell")
    verb.add_argument("runs", type=Path, nargs=2, metavar="RUN")
    verb = add("env", environment, "show the environment that a measurement would record")
    verb.add_argument("--device", choices=["cpu", "cuda"], default="cpu")


def _add_models(add: AddVerb) -> None:
    verb = add("convert", convert, "write a checkpoint in another format or under other names")
    verb.add_argument("source", type=Path, help=".pkl (detectron2), .pth, .pt, .bin, .safetensors, or a Hugging Face folder")
    verb.add_argument("target", type=Path, help="file to write; its suffix says the format: .pkl, .pth, .pt, .bin or .safetensors")
    verb.add_argument("--names", choices=["original", "transformers"], default="original", help="whose parameter names the target has")
    verb = add("export", export, "write a model as ONNX (.onnx) or as a program of torch (.pt2), of standard operators alone")
    verb.add_argument("model", help="name in the model registry")
    verb.add_argument("--out", type=Path, required=True, help="file to write; its suffix says the format")
    verb.add_argument("--weights", type=Path, help="checkpoint to load, random weights without it")
    verb.add_argument("--classes", type=int, default=150, help="classes of the model, 150 by default")
    verb.add_argument("--attention", default="masked_fused", help="name in the attention registry, masked_fused by default")
    verb.add_argument("--size", default="512x512", help="HEIGHTxWIDTH of the images, 512x512 by default")
    verb.add_argument("--batch", type=int, default=1, help="images of a call, 1 by default")


def _add_data(add: AddVerb) -> None:
    verb = add("data", data, "check a data set, or show what a model will be trained on")
    verb.add_argument("do", choices=["check", "preview"])
    verb.add_argument("path", type=Path, help="folder of the data set")
    verb.add_argument("--layout", help="its layout, found by its files by default: see docs/datasets.md")
    verb.add_argument("--limit", type=int, default=0, help="check: images of each split to read, all by default")
    verb.add_argument("--out", type=Path, help="preview: PNG file to write")
    verb.add_argument("--split", default="train", help="preview: train by default")
    verb.add_argument("--crop", default="384x384", help="preview: HxW of the training crops")
    verb.add_argument("--seed", type=int, default=0, help="preview: another seed shows other crops")


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
