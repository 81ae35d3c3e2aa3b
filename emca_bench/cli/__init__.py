"""The command line: a verb a function, beside those of its kind. Starts without torch."""

from __future__ import annotations

import errno
import os
import select
import sys
from collections.abc import Sequence

from emca_bench.cli.common import INTERRUPTED, UNREAD, USAGE
from emca_bench.cli.parser import build_parser
from emca_bench.errors import UsageError

__all__ = ["build_parser", "main"]

STDOUT = 1
"""File descriptor of standard output."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = build_parser().parse_args(argv)
    try:
        code = arguments.verb(arguments, argv)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except UsageError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        if not _is_unread(STDOUT):
            raise
        # as `| head` leaves it: who reads has seen enough, and the interpreter shall not flush into it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
        return UNREAD
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        return _complain(f"cannot write {error.filename or 'the output'}: {error.strerror}; what was measured before is kept")


def _is_unread(descriptor: int) -> bool:
    """Whether it is a pipe that nobody reads any more."""
    asked = select.poll()
    asked.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in asked.poll(0))


def _complain(message: str) -> int:
    print(f"emca-bench: {message}", file=sys.stderr)
    return USAGE
