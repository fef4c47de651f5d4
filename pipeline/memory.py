"""Tells the C library to keep the memory that is freed, instead of handing it back at once.

By default glibc maps every large array anew and unmaps it when it is freed, so each layer of an
encoder on a CPU touches fresh pages. Where page faults are dear (virtual machines above all) that
can cost more than the arithmetic; docs/benchmarks.md has a measurement.
"""

import ctypes
import logging
import sys

logger = logging.getLogger(__name__)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h of glibc
KEPT_BYTES = 1 << 30
GROWTH_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """Set glibc's allocator so; return whether it was (elsewhere nothing is done)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library, such as musl
        logger.debug("the allocator is not glibc's; left as it is")
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, KEPT_BYTES), (M_TOP_PAD, GROWTH_BYTES))
    return all(mallopt(name, value) == 1 for name, value in settings)
