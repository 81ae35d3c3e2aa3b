"""Everything that only a machine with a CUDA device can verify, in one command. Needs an environment with the project's extras.

    python scripts/verify_gpu.py              all parts, an hour or so; logs and summary.json in reports/local/verify-gpu
    python scripts/verify_gpu.py --list       what would run, and what is missing for it; needs no device
    python scripts/verify_gpu.py --only tests --only triton --quick

A part that fails or whose tool is missing does not stop the others. Exit status: 0 if all parts that could run passed, else 1; 2 without a
CUDA device.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "reports" / "local" / "verify-gpu"
PYTHON = sys.executable
ON_DEVICE = ["-m", "pytest", "tests_triton/interpret", "-q", "-p", "no:cacheprovider"]
SHORT = ["-k", "any_number_of_pixels or ties or gradients or full_and_empty", "--timeout=0"]
"""A part of the tests that reaches every kernel; under a sanitizer a launch takes up to a thousand times as long."""
COMPILED = {"TRITON_INTERPRET": "0"}
UNCACHED = {**COMPILED, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
"""Each tensor an allocation of its own, so that a read beyond its end is one beyond an allocation."""


@dataclass(frozen=True)
class Part:
    """One command."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    tool: str | None = None
    """A program that it needs beside Python."""

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        return f"{self.tool} is not on PATH" if self.tool and shutil.which(self.tool) is None else None

    def shown(self) -> str:
        """The command as one would type it."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join([*variables, *self.command])


@dataclass(frozen=True)
class Outcome:
    """What became of a part."""

    name: str
    command: str
    status: str
    """passed, failed, or skipped."""
    reason: str = ""
    seconds: float = 0.0


def parts(*, quick: bool) -> list[Part]:
    """All parts in their order: right first, then timed, then looked into."""
    study = [PYTHON, "-m", "emca_bench", "run", "kernels_cuda", "--device", "cuda", *(["--quick"] if quick else [])]
    sanitized = [PYTHON, *ON_DEVICE, *SHORT]
    profiled = [
        "ncu",
        "--set",
        "full",
        "--kernel-name",
        "regex:.*(prototypes|emca_attention).*",
        "--launch-count",
        "16",
        "--force-overwrite",
    ]
    return [
        Part("environment", [PYTHON, "-m", "emca_bench", "env", "--device", "cuda"]),
        Part("tests", [PYTHON, "-m", "pytest", "tests", "-m", "gpu", "-q"]),
        Part("triton", [PYTHON, *ON_DEVICE], COMPILED),
        Part("compiled", [PYTHON, "-m", "pytest", "tests_triton/compile", "-q"], COMPILED),
        *(
            Part(
                tool,
                ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--target-processes", "all", *sanitized],
                UNCACHED,
                "compute-sanitizer",
            )
            for tool in ("memcheck", "racecheck", "initcheck")
        ),
        Part("study", study),
        Part("ncu", [*profiled, "--export", str(FOLDER / "kernels"), PYTHON, *ON_DEVICE, *SHORT], COMPILED, "ncu"),
    ]


def run(part: Part, folder: Path) -> Outcome:
    """Run a part and keep what it prints in `folder`."""
    missing = part.missing()
    if missing:
        return Outcome(part.name, part.shown(), "skipped", missing)
    started, log = time.monotonic(), folder / f"{part.name}.log"
    with log.open("w") as file:
        finished = subprocess.run(
            part.command, cwd=ROOT, env={**os.environ, **part.environment}, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    seconds = round(time.monotonic() - started, 1)
    if finished.returncode == 0:
        return Outcome(part.name, part.shown(), "passed", seconds=seconds)
    return Outcome(part.name, part.shown(), "failed", f"exit status {finished.returncode}, see {log.relative_to(folder.parent)}", seconds)


def has_device() -> bool:
    """Whether torch finds a CUDA device, asked in a process of its own."""
    ask = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([PYTHON, "-c", ask], check=False).returncode == 0


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    known = [part.name for part in parts(quick=False)]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="show the commands and run none")
    parser.add_argument("--only", action="append", choices=known, metavar="PART", help=f"one of {', '.join(known)}; may be repeated")
    parser.add_argument("--quick", action="store_true", help="the study in its quick form")
    options = parser.parse_args(arguments)
    wanted = [part for part in parts(quick=options.quick) if not options.only or part.name in options.only]
    if options.list:
        for part in wanted:
            missing = part.missing()
            print(f"{part.name}{f' (skipped: {missing})' if missing else ''}: {part.shown()}")
        return 0
    if not has_device():
        print("torch finds no CUDA device; --list shows what would run", file=sys.stderr)
        return 2
    FOLDER.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for part in wanted:
        print(f"{part.name}: {part.shown()}", flush=True)
        outcomes.append(run(part, FOLDER))
        print(f"{part.name}: {outcomes[-1].status} {outcomes[-1].reason}".rstrip(), flush=True)
        # after each part: an interrupt leaves what is known
        (FOLDER / "summary.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    return int(any(outcome.status == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
