"""From a run folder to the files that people read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from emca_bench.errors import UsageError
from emca_bench.records import write_atomically
from emca_bench.report.findings import findings
from emca_bench.report.html import to_html
from emca_bench.report.load import load_run
from emca_bench.report.markdown import to_markdown
from emca_bench.report.sections import document
from emca_bench.report.summary import to_json

MARKDOWN, HTML, SUMMARY, FIGURES = "report.md", "report.html", "summary.json", "figures"
"""Names within the folder of a report; the last is a folder."""


@dataclass(frozen=True, kw_only=True)
class RenderedReport:
    """Where a report was written."""

    markdown_path: Path
    html_path: Path
    summary_path: Path


def report_files(run_dir: Path) -> dict[str, bytes]:
    """Every file of the report of a run folder, by its path below the target; writes nothing.

    Raises:
        UsageError: `run_dir` is no run folder or a damaged one.
    """
    found = findings(load_run(run_dir))
    report = document(found)
    files = {f"{FIGURES}/{figure.name}.{suffix}": content for figure in report.figures() for suffix, content in figure.files.items()}
    texts = {MARKDOWN: to_markdown(report, figure_folder=FIGURES), HTML: to_html(report), SUMMARY: to_json(found)}
    return files | {name: text.encode() for name, text in texts.items()}


def render(run_dir: Path, out_dir: Path | None = None) -> RenderedReport:
    """Write report.md, report.html, summary.json and figures/ for a run folder.

    Args:
        run_dir: the run folder; it is only read, unless the report goes there.
        out_dir: where to write, the run folder itself by default.

    Raises:
        UsageError: `run_dir` is no run folder or a damaged one, or the target cannot be written.
    """
    files = report_files(run_dir)
    target = run_dir if out_dir is None else out_dir
    try:
        (target / FIGURES).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomically(target / name, content)
    except OSError as error:
        raise UsageError(f"the report cannot be written to {target}: {error.strerror}") from None
    return RenderedReport(markdown_path=target / MARKDOWN, html_path=target / HTML, summary_path=target / SUMMARY)
