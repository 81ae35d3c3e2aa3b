"""The verb data: check a data set, or show what a model will be trained on."""

from __future__ import annotations

import argparse
import sys

from emca_bench.cli.common import FAILED, OK
from emca_bench.errors import UsageError


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
