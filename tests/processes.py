"""Real processes on this machine: of torch.distributed, as torchrun starts them, and to be killed.

They are forked from one server that has imported torch and the product, so that each begins to work
at once; to start Python anew for each of them would take seconds.
"""

import multiprocessing
import os
import tempfile
import traceback
from importlib import import_module
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 300  # most of it is for the imports, on a machine with much else to do
IMPORTED = [
    *("torch.distributed", "align.trainer", "pipeline.run.filling", "pipeline.run.folder"),
    *("pipeline.run.align", "pipeline.stores.convert", "pipeline.stores.subset"),
    *("pipeline.cli", "pipeline.stores.hdf5", "pipeline.stores.clip_retrieval"),
    *("pipeline.run.evaluate", "pipeline.export.exports", "pipeline.embed", "pipeline.search"),
]


def forks() -> ForkServerContext:
    """Processes that begin to work at once: their server has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)  # of no effect where the server is there
    return context


def run_processes(size: int, module: str, function: str, *arguments: str) -> None:
    """Call a function of a module in that many processes, and wait for all of them."""
    with tempfile.TemporaryDirectory() as folder:
        children = [
            forks().Process(target=_join, args=(folder, rank, size, module, function, arguments))
            for rank in range(size)
        ]
        for child in children:
            child.start()
        try:
            for child in children:
                child.join(SECONDS)
        finally:
            for child in children:
                child.kill()
                child.join()
        failed = [child.exitcode for child in children if child.exitcode]
        told = [path.read_text() for path in Path(folder).glob("*.txt")]
    assert not failed, "\n".join(told)


def _join(
    folder: str, rank: int, size: int, module: str, function: str, arguments: tuple[str, ...]
) -> None:
    """Join the others over gloo, and do the work."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        meeting = f"file://{folder}/meeting"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
        getattr(import_module(module), function)(*arguments)
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.txt").write_text(traceback.format_exc())
        raise
