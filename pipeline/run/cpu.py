"""How many processors this process may use, which in a container is seldom all that there are."""

import ctypes
import logging
import os
import sys
from pathlib import Path

logger = logging.getLogger(__name__)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h of glibc
KEPT_BYTES = 1 << 30
GROWTH_BYTES = 64 << 20
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


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


def usable_processors() -> int:
    """Return the processors that the process is allowed, by its affinity and by its quota.

    The quota is that of the container (cgroup v2), as `docker run --cpus` and Kubernetes set it.
    """
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    try:
        quota, period = CPU_QUOTA.read_text(encoding="ascii").split()
        count = min(count, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # there is none: no such file, or the word "max"
        pass
    return count
