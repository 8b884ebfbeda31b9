"""Settings for how the C library gives memory back."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Let the memory that a step frees serve the next step. By default glibc returns blocks of 32
    MB and more to the system at once, and every new one is paid for in page faults, at a tenth of
    memory's speed. Does nothing without glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_TRIM_THRESHOLD, -1)
    if not mallopt(_MMAP_THRESHOLD, 2**30):
        mallopt(_MMAP_THRESHOLD, 2**25)  # all that older versions allow
