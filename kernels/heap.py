"""The C library's heap, told to keep what it has.

A step frees its activations and asks for the same sizes again. glibc hands large blocks back to the system, and the kernel
then gives 30,000 to 350,000 zeroed pages a step: 5 to 11 % of forward and backward at 16 samples (bench/LOG.md). What is kept
is about what the largest step needed, and another request of this process may have it. It takes some steps to settle: small
blocks move into the first holes, and a large request then finds them too small.
"""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1
_USERS_OWN = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep() -> bool:
    """From now on freed memory stays with the process; whether that could be had.

    Left alone where the environment speaks for itself (MALLOC_*, GLIBC_TUNABLES, an allocator preloaded), and where the C
    library is not glibc.
    """
    if any(name.startswith(_USERS_OWN) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, _NEVER) and mallopt(_M_MMAP_MAX, 0))
