"""What becomes of memory that a call frees.

By default glibc gives every large tensor back to the system and asks for it anew at the next call, which then waits for the system to
clear each page: at 1024x2048 pixels that is a third of the time, and it varies from run to run with what the host does. Kept, it is
paid for in the warm-up, and the calls that are timed show the work itself.
"""

from __future__ import annotations

import ctypes
from functools import cache

# names and numbers of glibc's malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_NEVER = 2**31 - 1
_PAD = 64 * 2**20


@cache
def keep_freed_memory() -> str:
    """From now on this process keeps what it frees.

    Returns:
        "kept", or "as the system does" where the C library has no such choice.
    """
    # not trimmed between cells: a host may take back what a virtual machine frees, and then the next warm-up takes half a minute
    try:
        libc = ctypes.CDLL(None)
        told = [libc.mallopt(name, value) for name, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _PAD))]
    except (AttributeError, OSError):
        told = [0]
    return "kept" if all(told) else "as the system does"
