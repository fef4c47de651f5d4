"""Decoding and resizing: the fast mode against the exact one, and threads against processes.

Photographs of 500 × 375 pixels, prepared as for DINOv2 (256, centre 224). The fast and the exact
mode are compared on one core, by processor time; threads and processes by the clock, in turn, each
as many as there are processors.
"""

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from features.images import Preprocessing, decode, prepare_fast
from pipeline.run.cpu import keep_freed_memory, usable_processors
from tests.benchmarks.figure import Figure, figure_of
from tests.photographs import as_jpeg, synthetic

DINOV2 = Preprocessing.from_config(
    {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 256},
        "crop_size": {"height": 224, "width": 224},
    }
)
LIMIT = 10**8
BATCH = 16


def exact(data: bytes) -> np.ndarray:
    """Prepare one image in the exact mode."""
    return DINOV2.apply(decode(data, max_pixels=LIMIT))


def fast(data: bytes) -> np.ndarray:
    """Prepare one image in the fast mode."""
    return prepare_fast(data, DINOV2, max_pixels=LIMIT)


def batch(prepare: Callable[[bytes], np.ndarray], images: Sequence[bytes]) -> np.ndarray:
    """Prepare a batch, which is what a worker hands over."""
    return np.stack([prepare(data) for data in images])


def seconds_of_one_core(prepare: Callable[[bytes], np.ndarray], images: Sequence[bytes]) -> float:
    """Processor time of this thread, which other work on the machine changes little."""
    started = time.thread_time()
    for data in images:
        prepare(data)
    return time.thread_time() - started


def seconds_of(
    pool: Executor, prepare: Callable[[bytes], np.ndarray], images: list[bytes]
) -> float:
    """Time by the clock until all batches are back."""
    batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    started = time.perf_counter()
    for _ in pool.map(partial(batch, prepare), batches):
        pass
    return time.perf_counter() - started


def start_process() -> None:
    """Set a worker process up as the threads of this one are."""
    keep_freed_memory()
    torch.set_num_threads(1)


def measure(images: int = 256, rounds: int = 5) -> list[Figure]:
    """Return the ratios of the speeds."""
    keep_freed_memory()
    photographs = [as_jpeg(synthetic(seed, 500, 375)) for seed in range(images)]
    faster: list[float] = []
    threaded: dict[str, list[float]] = {"exact": [], "fast": []}
    spawn = multiprocessing.get_context("spawn")
    workers = usable_processors()
    with (
        ThreadPoolExecutor(workers) as threads,
        ProcessPoolExecutor(workers, spawn, start_process) as processes,
    ):
        for number in range(rounds + 1):
            ratio = seconds_of_one_core(exact, photographs) / seconds_of_one_core(fast, photographs)
            ratios = {
                name: seconds_of(processes, prepare, photographs)
                / seconds_of(threads, prepare, photographs)
                for name, prepare in (("exact", exact), ("fast", fast))
            }
            if number:  # in the first round the processes are still importing
                faster.append(ratio)
                for name, each in ratios.items():
                    threaded[name].append(each)
    figure = partial(figure_of, unit="ratio of images/s", direction="min", module="decoding")
    return [
        figure("fast / exact, decode and resize on one core", faster, goal=2.0),
        *(
            figure(f"decoding threads / processes, {name}", values, goal=None)
            for name, values in threaded.items()
        ),
    ]


if __name__ == "__main__":
    for each in measure():
        print(json.dumps(each.as_dict()) if "--json" in sys.argv else each)
