"""The one exception that the command line turns into a sentence and exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Input that cannot be used: the message names the thing, what was found and what was expected."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`' (did you mean 'emca'?)'` for the nearest of the known names, or nothing where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def listing(names: Iterable[str]) -> str:
    """Names in reading order for an error message."""
    return ", ".join(sorted(names))
