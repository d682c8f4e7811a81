"""Keeps freed memory with the process, which on CPU is worth more than any kernel.

XLA:CPU allocates the temporary memory of every call afresh and frees it afterwards. glibc gives
blocks of that size back to the operating system, so each step would fault all its pages in again,
4 KiB at a time and zeroed: several times what elementwise work on them costs.
"""

import ctypes

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_UNLIMITED = -1  # malloc reads both thresholds, bytes, as unsigned


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to reuse large freed blocks instead of returning them to the system.

    One arena for all threads, since only the first can hold large blocks. Call it at the start of
    a process. Returns False, having done nothing, where the C library has no such switch (macOS,
    musl, Windows).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = ((_M_MMAP_THRESHOLD, _UNLIMITED), (_M_TRIM_THRESHOLD, _UNLIMITED), (_M_ARENA_MAX, 1))
    return all([mallopt(name, value) == 1 for name, value in settings])
