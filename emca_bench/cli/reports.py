"""Verbs that read run folders and the machine: report, compare, env."""

from __future__ import annotations

import argparse
from pathlib import Path

from emca_bench.cli.common import FAILED, OK
from emca_bench.errors import UsageError


def render_report(folder: Path, out: Path) -> None:
    """Write the report of a run folder and print where it is."""
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
    render_report(arguments.run, out)
    if arguments.readme:
        update_readme(arguments.readme, arguments.run, arguments.accuracies)
        print(f"updated: {arguments.readme}")
    return OK


def compare(arguments: argparse.Namespace, argv: list[str]) -> int:
    """`emca-bench compare`."""
    from emca_bench.report.compare import compare_runs

    print(compare_runs(*arguments.runs))
    return OK


def environment(arguments: argparse.Namespace, argv: list[str]) -> int:
    """`emca-bench env`."""
    import json

    from emca_bench.environment import collect_environment, default_threads

    print(json.dumps(collect_environment(threads=default_threads(), device=arguments.device), indent=1))
    return OK
