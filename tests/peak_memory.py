"""The greatest resident size of a command, without that of the process that asks for it."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# A process begins with the peak of the one that started it, so a small one stands between.
LAUNCHER = """
import os, sys
process = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(process, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status) % 256)
"""


def peak_bytes_of(command: Sequence[str], cwd: Path | None = None) -> tuple[int, str]:
    """Run a Python command to its end; return its most bytes of memory at once, and its stderr.

    Raises:
        RuntimeError: It failed; its stderr is in the message.
    """
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, sys.executable, *command],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command} failed with status {done.returncode}: {done.stderr}")
    return int(done.stdout.split()[-1]) * 1024, done.stderr
