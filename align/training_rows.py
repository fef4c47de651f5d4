"""The rows of all stores that a training reads: what is made of them before the first step."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from align.columns import Columns, Selection, select_rows
from align.config import AlignConfig
from align.heads import AlignmentModel
from align.heldout import HeldOut, HeldOutRows
from align.loader import Loader, LoaderOptions, Source
from align.loss import ALONE
from align.processes import Ring
from align.start.closed_form import start_from_closed_form
from align.start.defaults import settled
from align.start.moments import PairedRows
from align.windows import MIB, shares


@dataclass(frozen=True)
class TrainingRows:
    """The rows of all stores, and how many of a batch come from each, in proportion."""

    columns: Sequence[Columns]
    selections: Sequence[Selection]
    weights: Sequence[float]

    @classmethod
    def select(
        cls, columns: Sequence[Columns], weights: Sequence[float], config: AlignConfig
    ) -> "TrainingRows":
        """Decide on every row of the stores.

        Raises:
            TrainingError: No row of a store is left to train on.
        """
        scored = shares(weights, config.holdout_rows)
        limits = [None] * len(scored) if config.rows is None else shares(weights, config.rows)
        selections = [
            select_rows(each, holdout=config.holdout, holdout_rows=of_scored, rows=rows)
            for each, of_scored, rows in zip(columns, scored, limits, strict=True)
        ]
        return cls(columns, selections, weights)

    def settled(self, config: AlignConfig, ring: Ring) -> AlignConfig:
        """Decide on the settings that were not given; see `align.start.defaults`."""
        rows = [int(each.train.sum()) for each in self.selections]
        first = self.columns[0]
        return settled(
            config,
            rows=sum(rows),
            fits=_largest_batch(rows, self.weights, ring.size),
            dims=(first.image.dim, first.text[0].dim),
        )

    def loader(
        self, config: AlignConfig, *, seed: int, device: torch.device, ring: Ring = ALONE
    ) -> Loader:
        """Make the loader of this process.

        Args:
            config: Settings.
            seed: Of the order.
            device: Where the features go.
            ring: The processes that train together.

        Raises:
            TrainingError: The rows or the memory do not do for these settings.
        """
        parts = zip(self.columns, self.selections, self.weights, strict=True)
        options = LoaderOptions(
            batch_size=config.batch_size,
            memory_bytes=config.memory_mb * MIB,
            host_memory_bytes=config.host_memory_mb * MIB,
            seed=seed,
            captions_per_image=config.captions_per_image,
            with_caption_ids=config.loss.positives == "identical",
            verify=config.verify,
            cache=config.cache,
            cache_bytes=config.cache_mb * MIB,
            device=device,
            rank=ring.rank,
            ranks=ring.size,
        )
        sources = [
            Source(each, selection.train, selection.text_ok, weight)
            for each, selection, weight in parts
        ]
        return Loader(sources, options)

    def heldout(self, config: AlignConfig, device: torch.device) -> HeldOut | None:
        """Read the held-out rows, if there are any."""
        parts = [
            HeldOutRows(each, selection.heldout, selection.text_ok[selection.heldout])
            for each, selection in zip(self.columns, self.selections, strict=True)
            if len(selection.heldout)
        ]
        if not parts:
            return None
        return HeldOut(parts, identical=config.loss.positives == "identical", device=device)

    def start(
        self,
        model: AlignmentModel,
        config: AlignConfig,
        heldout: HeldOut | None,
        *,
        kept: Path,
        device: torch.device,
        ring: Ring,
    ) -> None:
        """Put the closed form into a model, on the first of several processes.

        Args:
            model: With random weights.
            config: Settings.
            heldout: Of the first of several processes.
            kept: Folder of the moments.
            device: Where they are computed.
            ring: The processes that read the rows.

        Raises:
            StoreError: A chunk is damaged.
            TrainingError: A feature is not a finite number.
        """
        total, rows, factors = None, [], []
        for number, each in enumerate(self.columns):
            selected = self.selections[number]
            trained = PairedRows.trained(each, selected, config.loss.field_weights)
            sums = trained.moments(kept / f"store-{number}.safetensors", device, ring)
            if not ring.leads:
                continue
            factors.append(self.weights[number] / (sum(self.weights) * sums.rows.item()))
            rows.append(trained)
            part = sums.times(factors[-1])
            total = part if total is None else total + part
        if total is not None:
            start_from_closed_form(model, rows, factors, total, heldout, config)


def _largest_batch(rows: Sequence[int], weights: Sequence[float], processes: int) -> int:
    """Compute the largest batch, divisible among processes, that no store has too few rows for."""
    batch = min(
        int(of_store * sum(weights) / weight)
        for of_store, weight in zip(rows, weights, strict=True)
    )
    batch = min(batch, sum(rows)) // processes * processes
    while batch > processes and any(
        share > of_store for share, of_store in zip(shares(weights, batch), rows, strict=True)
    ):
        batch -= processes
    return max(batch, processes)
