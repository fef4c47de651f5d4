"""Rows whose features are nearly the same."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from features.column import Column
from pipeline.embedding.rows import feature_blocks, ok_rows
from pipeline.interrupt import Stopped, StopRequest
from pipeline.progress import ProgressLine

ROUNDING = 1e-6  # a vector's cosine with itself may be this much below 1


def first_of_alike(
    column: Column, among: Bool[np.ndarray, "rows"], cosine: float, stop: StopRequest
) -> Bool[np.ndarray, "rows"]:
    """Return which rows stay when a row goes that is like one that stays before it.

    Every row is compared with all that stay before it, block by block, on the GPU where there is
    one: the time grows with the square of the rows, the memory does not grow. Rows that are not ok
    have no features and stay.

    Args:
        column: Whose features are compared.
        among: Rows that come into question; all others go.
        cosine: From which cosine on two rows are alike.
        stop: Asked before every block.

    Raises:
        Stopped: A signal came.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stays = among.copy()
    rows = np.flatnonzero(among & np.isin(np.arange(column.rows), ok_rows(column)))
    size = column.rows_per_chunk
    chunks = [rows[rows // size == chunk] for chunk in np.unique(rows // size)]
    with ProgressLine(f"alike in {column.name}", len(chunks), "chunks") as line:
        for number, chunk in enumerate(chunks):
            if stop():
                raise Stopped
            features = _directions(column, chunk, device)
            is_alike = torch.zeros(len(chunk), dtype=torch.bool, device=device)
            for before in chunks[:number]:
                if len(kept := before[stays[before]]):
                    others = _directions(column, kept, device)
                    is_alike |= (features @ others.T).amax(1) >= cosine - ROUNDING
            stays[chunk] = ~_with_alike_within(features, is_alike, cosine)
            line.advance(1)
    return stays


def _directions(
    column: Column, rows: Int64[np.ndarray, "rows"], device: torch.device
) -> Float[Tensor, "rows dim"]:
    features = np.concatenate(list(feature_blocks(column, rows)))
    return F.normalize(torch.from_numpy(features).to(device).float(), dim=-1)


def _with_alike_within(
    features: Float[Tensor, "rows dim"], is_alike: Bool[Tensor, "rows"], cosine: float
) -> Bool[np.ndarray, "rows"]:
    """Add rows that are like one of the same block that stays before them."""
    alike = torch.tril(features @ features.T >= cosine - ROUNDING, -1).cpu().numpy()
    goes: np.ndarray = is_alike.cpu().numpy()
    for row in np.flatnonzero(alike.any(axis=1)):
        goes[row] |= bool((alike[row] & ~goes).any())
    return goes
