"""Real processes that talk over gloo on this machine, as those of torchrun do."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 300  # most of it is for the imports, on a machine with much else to do
START = """
import sys
from importlib import import_module
import torch, torch.distributed as dist
module, function, meeting, rank, size, *arguments = sys.argv[1:]
rank, size = int(rank), int(size)
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
getattr(import_module(module), function)(*arguments)
dist.destroy_process_group()
"""


def run_processes(size: int, module: str, function: str, *arguments: str) -> None:
    """Call a function of a module in that many processes, and wait for all of them."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", START, module, function, f"{folder}/meeting"]
        children = [
            subprocess.Popen(
                [*command, str(rank), str(size), *arguments],
                cwd=ROOT,
                env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        try:
            told = [child.communicate(timeout=SECONDS)[1] for child in children]
        finally:
            for child in children:
                child.kill()
                child.wait()
    failed = [text for child, text in zip(children, told, strict=True) if child.returncode]
    assert not failed, "\n".join(failed)
