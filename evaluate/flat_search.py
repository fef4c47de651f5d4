"""Exact search of one block of rows: FAISS on a GPU or on the processor, torch without FAISS."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64

COSINES_AT_ONCE = 1 << 26
"""In torch, where a matrix of queries × rows is made: 256 MiB."""
MOST_ON_GPU = 2048
"""FAISS finds no more neighbours than these on a GPU."""
Queries = Float32[np.ndarray, "queries dim"]
Block = Float32[np.ndarray, "rows dim"]
Found = tuple[Float32[np.ndarray, "queries k"], Int64[np.ndarray, "queries k"]]
"""Inner products and positions in the block, the greatest first."""


@dataclass(frozen=True)
class FlatSearch:
    """A way to compare every query with every row; all of them find the same neighbours."""

    name: str
    """What searches, where, and why no faster way is taken."""
    search: Callable[[Queries, Block, int], Found]
    """From queries, a block and k (at most the rows of the block) to the k rows nearest."""


@cache
def flat_search() -> FlatSearch:
    """Return the fastest way that this machine has."""
    try:
        import faiss  # heavy, and not needed by the other measures
    except ImportError as error:
        return FlatSearch(f"torch {torch.__version__}: no FAISS ({error})", _of_torch)
    on_processor = partial(_on_processor, faiss)
    name = f"FAISS {faiss.__version__}"
    if not hasattr(faiss, "StandardGpuResources"):
        return FlatSearch(f"{name} on the CPU: built without GPU", on_processor)
    if not faiss.get_num_gpus():
        return FlatSearch(f"{name} on the CPU: no GPU", on_processor)
    on_gpu = partial(_on_gpu, faiss, faiss.StandardGpuResources())
    return FlatSearch(f"{name} on the GPU", on_gpu)


def _on_processor(faiss: Any, queries: Queries, block: Block, k: int) -> Found:
    found: Found = faiss.knn(queries, block, k, metric=faiss.METRIC_INNER_PRODUCT)
    return found


def _on_gpu(faiss: Any, resources: Any, queries: Queries, block: Block, k: int) -> Found:
    if k > MOST_ON_GPU:
        return _on_processor(faiss, queries, block, k)
    metric = faiss.METRIC_INNER_PRODUCT
    found: Found = faiss.knn_gpu(resources, queries, block, k, metric=metric)
    return found


def _of_torch(queries: Queries, block: Block, k: int) -> Found:
    rows = torch.from_numpy(block)
    step = max(1, COSINES_AT_ONCE // len(block))
    parts = [
        torch.topk(torch.from_numpy(queries[start : start + step]) @ rows.T, k, dim=1)
        for start in range(0, len(queries), step)
    ]
    cosines, places = (torch.cat(each).numpy() for each in zip(*parts, strict=True))
    return cosines, places
