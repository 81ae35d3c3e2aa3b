"""What becomes of memory that a call frees.

By default glibc gives every large tensor back to the system and asks for it anew at the next call, which then waits for the system to
clear each page: at 1024x2048 pixels that is a third of the time, and it varies from run to run with what the host does. Kept, it is
paid for in the warm-up, and the calls that are timed show the work itself.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

# names and numbers of glibc's malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_NEVER = 2**31 - 1
_PAD = 64 * 2**20


def keep_freed_memory() -> str:
    """From now on this process keeps what it frees; what it kept so far goes back, so that all cells start alike.

    Returns:
        "kept", or "as the system does" where the C library has no such choice.
    """
    libc = _kept()
    if libc is None:
        return "as the system does"
    libc.malloc_trim(0)
    return "kept"


@cache
def _kept() -> Any:
    """The C library once it was told, or None."""
    try:
        libc = ctypes.CDLL(None)
        told = [libc.mallopt(name, value) for name, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _PAD))]
        libc.malloc_trim.argtypes = [ctypes.c_size_t]
    except (AttributeError, OSError):
        return None
    return libc if all(told) else None
