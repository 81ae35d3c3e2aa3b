"""The command line: a verb a function, beside those of its kind. Starts without torch."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from emca_bench.cli.common import INTERRUPTED, UNREAD, USAGE
from emca_bench.cli.parser import build_parser
from emca_bench.errors import UsageError

__all__ = ["build_parser", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = build_parser().parse_args(argv)
    try:
        code = arguments.verb(arguments, argv)
        sys.stdout.flush()
        return code
    except UsageError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # as `| head` leaves it: who reads has seen enough, and the interpreter shall not flush into it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        return _complain(f"cannot write {error.filename or 'to the output folder'}: {error.strerror}; what was measured before is kept")


def _complain(message: str) -> int:
    print(f"emca-bench: {message}", file=sys.stderr)
    return USAGE
