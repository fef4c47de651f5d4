"""What a training reads: the columns of its stores, the loader over them, and the held-out rows."""

from collections.abc import Sequence
from typing import Any

import torch

from align.config import AlignConfig
from align.heldout import HeldOut, HeldOutRows
from align.loader import MIB, Loader, LoaderOptions, Source
from align.ring import Ring
from align.selection import Columns, PairedStore, Selection, select_rows
from align.tiers import shares
from features.column import Column
from features.errors import TrainingError
from features.store import NOT_COMPARED

ELSEWHERE = {"image", "text", "store", "text_store"}  # said of the encoders and the rows
NO_MATTER = {"cache", "cache_mb", "host_memory_mb", "verify"}


def open_columns(
    stores: Sequence[PairedStore], config: AlignConfig, image: str, text: str
) -> list[Columns]:
    """Open what a training reads of each store, and check that it goes together.

    Raises:
        StoreError: A column is not there.
        TrainingError: The stores have not the rows or the caption fields that they should, or their
            features are not of the same encoders.
    """
    opened = [Columns.open(each, config, image, text) for each in stores]
    for columns in opened[1:]:
        _check_same_encoder(opened[0].image, columns.image)
        _check_same_encoder(opened[0].text[0], columns.text[0])
    return opened


def training_data(
    columns: Sequence[Columns],
    weights: Sequence[float],
    config: AlignConfig,
    *,
    seed: int,
    device: torch.device,
) -> tuple[Loader, HeldOut | None]:
    """Decide on every row of the stores, and make the loader and the held-out rows.

    Args:
        columns: Of each store.
        weights: How many rows of a batch come from each, in proportion.
        config: Settings.
        seed: Of the order.
        device: Where the features go.

    Returns:
        The loader of this process, and the held-out rows where it is the first of several.

    Raises:
        TrainingError: The rows or the memory do not do for these settings.
    """
    ring = Ring.of_processes()
    scored = shares(weights, config.holdout_rows)
    limits = [None] * len(scored) if config.rows is None else shares(weights, config.rows)
    selections = [
        select_rows(each, holdout=config.holdout, holdout_rows=of_scored, rows=rows)
        for each, of_scored, rows in zip(columns, scored, limits, strict=True)
    ]
    identical = config.loss.positives == "identical"
    loader = Loader(
        [
            _source(each, selection, config, weight)
            for each, selection, weight in zip(columns, selections, weights, strict=True)
        ],
        LoaderOptions(
            batch_size=config.batch_size,
            memory_bytes=config.memory_mb * MIB,
            host_memory_bytes=config.host_memory_mb * MIB,
            seed=seed,
            captions_per_image=config.captions_per_image,
            with_caption_ids=identical,
            verify=config.verify,
            cache=config.cache,
            cache_bytes=config.cache_mb * MIB,
            device=device,
            rank=ring.rank,
            ranks=ring.size,
        ),
    )
    parts = [
        HeldOutRows(each, selection.heldout, selection.text_ok[selection.heldout])
        for each, selection in zip(columns, selections, strict=True)
        if ring.leads and len(selection.heldout)
    ]
    return loader, HeldOut(parts, identical=identical, device=device) if parts else None


def describe(
    columns: Sequence[Columns], weights: Sequence[float], config: AlignConfig, seed: int
) -> dict[str, Any]:
    """Return what decides the result of a training, as JSON."""
    first = columns[0]
    described: dict[str, Any] = {
        "align": config.model_dump(mode="json", exclude=ELSEWHERE | NO_MATTER),
        "seed": seed,
        "fields": list(first.fields),
        "image": _describe_encoder(first.image),
        "text": _describe_encoder(first.text[0]),
        "store": _describe_rows(first),
    }
    if len(columns) > 1:
        described["mixed"] = [
            {**_describe_rows(each), "fields": list(each.fields), "weight": weight}
            for each, weight in zip(columns, weights, strict=True)
        ]
    return described


def _source(columns: Columns, selection: Selection, config: AlignConfig, weight: float) -> Source:
    of_fields = config.loss.field_weights
    return Source(
        columns,
        selection.train,
        selection.text_ok,
        field_weights=tuple(of_fields.get(name, 1.0) for name in columns.fields),
        weight=weight,
    )


def _describe_encoder(column: Column) -> dict[str, Any]:
    described = {
        "name": column.name.split("/")[1],
        "dim": column.dim,
        "fingerprint": column.fingerprint,
    }
    return described | ({"dtype": column.dtype.name} if column.is_scaled else {})


def _describe_rows(columns: Columns) -> dict[str, Any]:
    return {"rows": columns.store.rows, "keys_sha256": columns.store.keys_sha256}


def _check_same_encoder(ours: Column, other: Column) -> None:
    found, expected = other.fingerprint | {"dim": other.dim}, ours.fingerprint | {"dim": ours.dim}
    for field in sorted((found.keys() | expected.keys()) - NOT_COMPARED):
        if found.get(field) != expected.get(field):
            raise TrainingError(
                f"{other.path} has {field} = {found.get(field)!r}, but {ours.path} has "
                f"{expected.get(field)!r}. Features of the same encoder were expected in all "
                f"stores of align.mix. Extract one of them again."
            )
