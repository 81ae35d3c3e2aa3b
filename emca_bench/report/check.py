"""Whether the files on disk are what would be rendered: reports are generated, never edited."""

from __future__ import annotations

from pathlib import Path

from emca_bench.errors import UsageError
from emca_bench.report.build import report_files
from emca_bench.report.readme import updated_readme


def stale_files(run_dir: Path, out_dir: Path, *, readme: Path | None = None, accuracy_dir: Path | None = None) -> list[Path]:
    """Files of a report, and its README, that are missing or differ from what would be rendered now; writes nothing.

    Raises:
        UsageError: `run_dir` is no run folder or a damaged one, or the README cannot be updated.
    """
    expected = {out_dir / name: content for name, content in report_files(run_dir).items()}
    if readme is not None:
        expected[readme] = updated_readme(readme, run_dir, accuracy_dir).encode()
    return [path for path, content in expected.items() if _content(path) != content]


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
