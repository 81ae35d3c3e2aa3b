"""Every task of the project. One environment serves all sessions, made once in .nox/suite from constraints.txt.

python3 -m nox -s reproduce                 everything in minutes, ends with the path of a report
python3 -m nox -s tests                     lint, types, import contracts, tests
python3 -m nox -s accuracy -- camvid        one study; arguments behind -- go to `emca-bench run`
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["tests"]

ROOT = Path(__file__).parent
SUITE = ROOT / ".nox" / "suite"
BIN = SUITE / ("Scripts" if os.name == "nt" else "bin")


def suite(session: nox.Session) -> None:
    """Make the shared environment, unless it is there and made from the same files."""
    made_from = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))).hexdigest()
    stamp = SUITE / "made-from"
    if stamp.is_file() and stamp.read_text() == made_from:
        return
    session.run(sys.executable, "-m", "venv", "--clear", str(SUITE), external=True)
    install = [str(BIN / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", "constraints.txt"]
    session.log("installing torch and the other pinned packages, about 1.5 GB; minutes on a slow line")
    # torch first, so that nothing else decides which build of it comes
    session.run(*install, "torch", external=True)
    session.run(*install, "-e", ".[dev]", external=True)
    stamp.write_text(made_from)


def in_suite(session: nox.Session, tool: str, *arguments: str, **environment: str) -> None:
    session.run(str(BIN / tool), *arguments, external=True, env=environment)


def run_study(session: nox.Session, study: str) -> None:
    suite(session)
    arguments = list(session.posargs)
    if arguments and not arguments[0].startswith("-"):
        study = arguments.pop(0)
    in_suite(session, "emca-bench", "run", study, *arguments)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and import contracts."""
    suite(session)
    in_suite(session, "ruff", "check")
    in_suite(session, "ruff", "format", "--check")
    in_suite(session, "lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """Static types."""
    suite(session)
    in_suite(session, "mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """Lint, types, then every test. Set EMCA_DATASETS to test the readers of real images too."""
    if not session.posargs:
        lint(session)
        types(session)
    suite(session)
    # waiting threads sleep: tests start processes of their own, and spinning for them takes minutes
    in_suite(session, "pytest", *session.posargs, OMP_WAIT_POLICY="PASSIVE")


@nox.session
def tests_triton(session: nox.Session) -> None:
    """Triton kernels: interpreted, then compiled for GPUs that need not be there, then on a CUDA device if there is one."""
    suite(session)
    in_suite(session, "pytest", "tests_triton/interpret", *session.posargs, TRITON_INTERPRET="1")
    in_suite(session, "pytest", "tests_triton/compile", *session.posargs, TRITON_INTERPRET="0")
    is_there = session.run(str(BIN / "python"), "-c", "import torch; print(torch.cuda.is_available())", external=True, silent=True)
    if str(is_there).strip() == "True":
        in_suite(session, "pytest", "tests_triton/interpret", *session.posargs, TRITON_INTERPRET="0")
    else:
        session.log("no CUDA device: the kernels did not run on one")


@nox.session
def accuracy(session: nox.Session) -> None:
    """Train and evaluate. `-- camvid` for real images below EMCA_DATASETS, `-- --quick` for minutes."""
    run_study(session, "accuracy")


@nox.session
def flops(session: nox.Session) -> None:
    """Multiply-adds of whole models by component."""
    run_study(session, "flops")


@nox.session
def fps(session: nox.Session) -> None:
    """Frames per second of the decoder and of images to label maps."""
    run_study(session, "fps")


@nox.session
def attention(session: nox.Session) -> None:
    """The cross-attentions alone, against the number of pixels."""
    run_study(session, "attention")


@nox.session
def reproduce(session: nox.Session) -> None:
    """Everything in minutes, ends with the path of a report."""
    run_study(session, "reproduce")


@nox.session
def report(session: nox.Session) -> None:
    """Render the report of a run folder: `-- reports/local/reproduce`."""
    suite(session)
    if not session.posargs:
        session.error("which run? For example: python3 -m nox -s report -- reports/local/reproduce")
    in_suite(session, "emca-bench", "report", *session.posargs)
