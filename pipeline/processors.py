"""How many processors this process may use, which in a container is seldom all that there are."""

import os
from pathlib import Path

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


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
