"""Verbs that write models: convert, export."""

from __future__ import annotations

import argparse

from emca_bench.cli.common import OK
from emca_bench.errors import UsageError


def convert(arguments: argparse.Namespace, argv: list[str]) -> int:
    """`emca-bench convert`."""
    from emca_bench.models import checkpoints

    print(checkpoints.convert(arguments.source, arguments.target, names=arguments.names))
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
