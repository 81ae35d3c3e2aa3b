"""Every task of the project. One environment serves all sessions but one, made once in .nox/suite from constraints.txt.

python3 -m nox -s reproduce                 everything in minutes, ends with the path of a report
python3 -m nox -s tests                     lint, types, import contracts, tests
python3 -m nox -s tests_triton              the Triton kernels, interpreted and compiled; run where there is a CUDA device
python3 -m nox -s tests_triton_36           the same with Triton 3.6, in .nox/triton36; when asked for alone
python3 -m nox -s tests_detectron2          the detectron2 integration, in .nox/detectron2 from constraints-detectron2.txt
python3 -m nox -s kernels                   profile of the operators: gate, pytest-benchmark, roofline, targets
python3 -m nox -s accuracy -- camvid        one study; arguments behind -- go to `emca-bench run`
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["tests", "tests_triton", "tests_detectron2"]

ROOT = Path(__file__).parent
ENVIRONMENTS = ROOT / ".nox"


def binaries(environment: str) -> Path:
    return ENVIRONMENTS / environment / ("Scripts" if os.name == "nt" else "bin")


def make(session: nox.Session, environment: str, files: Sequence[str], *installs: Sequence[str], script: Sequence[str] = ()) -> None:
    """Make an environment with torch and what else is asked for, unless it is there and made from the same files."""
    made_from = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in files)).hexdigest()
    stamp = ENVIRONMENTS / environment / "made-from"
    if stamp.is_file() and stamp.read_text() == made_from:
        return
    session.run(sys.executable, "-m", "venv", "--clear", str(ENVIRONMENTS / environment), external=True)
    python = str(binaries(environment) / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", files[-1]]
    session.log("installing torch and the other pinned packages, about 1.5 GB; minutes on a slow line")
    # torch first, so that nothing else decides which build of it comes
    for packages in (["torch"], *installs):
        session.run(*install, *packages, external=True)
    if script:
        session.run(*script, external=True, env={"PYTHON": python})
    stamp.write_text(made_from)


def suite(session: nox.Session) -> None:
    """The environment of all sessions but `tests_detectron2`."""
    make(session, "suite", ["pyproject.toml", "constraints.txt"], ["-e", ".[dev]"])


def in_suite(session: nox.Session, tool: str, *arguments: str, **environment: str) -> None:
    session.run(str(binaries("suite") / tool), *arguments, external=True, env=environment)


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
def tests_detectron2(session: nox.Session) -> None:
    """Train, resume and evaluate through detectron2, which it installs; it fails where detectron2 is missing."""
    installer = "scripts/install_detectron2.sh"
    files = ["pyproject.toml", installer, "constraints-detectron2.txt"]
    make(session, "detectron2", files, ["pytest", "pytest-timeout"], script=["bash", installer, "--from-pypi"])
    pytest = str(binaries("detectron2") / "pytest")
    session.run(pytest, "tests/detectron2", *session.posargs, external=True, env={"OMP_WAIT_POLICY": "PASSIVE"})


@nox.session
def tests_triton(session: nox.Session) -> None:
    """Triton kernels: interpreted, then compiled for GPUs that need not be there, then on a CUDA device if there is one."""
    suite(session)
    in_suite(session, "pytest", "tests_triton/interpret", *session.posargs, TRITON_INTERPRET="1")
    in_suite(session, "pytest", "tests_triton/compile", *session.posargs, TRITON_INTERPRET="0")
    ask = "import torch; print(torch.cuda.is_available())"
    is_there = session.run(str(binaries("suite") / "python"), "-c", ask, external=True, silent=True)
    if str(is_there).strip() == "True":
        in_suite(session, "pytest", "tests_triton/interpret", *session.posargs, TRITON_INTERPRET="0")
    else:
        session.log("no CUDA device: the kernels did not run on one")


@nox.session
def tests_triton_36(session: nox.Session) -> None:
    """The Triton kernels with the version that GPU machines have: interpreted, then compiled."""
    make(session, "triton36", ["constraints-triton36.txt"], ["pytest", "pytest-timeout", "ninja", "numpy", "triton"])
    # Triton 3.6 makes scalars of NumPy arrays as NumPy no longer wants it
    ignored = "ignore:Conversion of an array with ndim > 0:DeprecationWarning"
    pytest = [str(binaries("triton36") / "python"), "-m", "pytest", "-W", ignored]
    for folder, interpreted in (("interpret", "1"), ("compile", "0")):
        environment = {"TRITON_INTERPRET": interpreted, "PYTHONPATH": str(ROOT / "kernels"), "OMP_WAIT_POLICY": "PASSIVE"}
        session.run(*pytest, f"tests_triton/{folder}", *session.posargs, external=True, env=environment)


@nox.session
def accuracy(session: nox.Session) -> None:
    """Train and evaluate. `-- camvid` for real images below EMCA_DATASETS, `-- --quick` for minutes."""
    run_study(session, "accuracy")


@nox.session
def ablations(session: nox.Session) -> None:
    """Accuracy beside cost, switch by switch: `-- prototypes`, `-- layers` or `-- components`, each with `--quick` for minutes."""
    if not session.posargs:
        session.error("which ablation? prototypes, layers or components; for example: python3 -m nox -s ablations -- prototypes --quick")
    run_study(session, session.posargs[0])


@nox.session
def flops(session: nox.Session) -> None:
    """Multiply-adds of whole models by component."""
    run_study(session, "flops")


@nox.session
def fps(session: nox.Session) -> None:
    """Frames per second of the decoder and of images to label maps; `-- fps_large` at 1024x2048, `-- speed` for a whole report."""
    run_study(session, "fps")


@nox.session
def attention(session: nox.Session) -> None:
    """The cross-attentions alone, against the number of pixels."""
    run_study(session, "attention")


@nox.session
def kernels(session: nox.Session) -> None:
    """Operators: right first, then timed one by one, then held against their targets. `-- --quick` for minutes."""
    suite(session)
    quick = "--quick" in session.posargs
    in_suite(session, "pytest", "tests/kernels", OMP_WAIT_POLICY="PASSIVE")
    folder = ROOT / "reports" / "local" / ("kernels-quick" if quick else "kernels")
    folder.mkdir(parents=True, exist_ok=True)
    in_suite(session, "pytest", "benchmarks", f"--benchmark-json={folder / 'benchmark.json'}", *(["--quick"] if quick else []))
    run_study(session, "kernels")


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
