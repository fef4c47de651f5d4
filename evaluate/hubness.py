"""Scores against hubness: some items are near to every query, and push the right ones down.

Each score is the cosine less a number of the gallery's item, its offset, which says how near the
item is to queries in general. It is taken from a bank of training rows and not from the rows that
are searched, so that it is there before the first query, and a test set tells nothing of itself.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from align.heldout import COSINES_AT_ONCE
from evaluate.config import Score
from evaluate.embedder import Embedder
from features.errors import EvaluationError
from features.storage.column import BLOCK_ROWS, Column
from features.store import FeatureStore

BANK_ROWS = 10_000
BANK_BLOCKS = 64
"""Of so many blocks of a store rows are drawn at most: of 23 million rows not all are read."""
NEIGHBOURS = 100
"""Of CSLS; of 10, 30, 100 and 300 the best on 1,198 rows of Flickr8k kept from the training."""
Kind = Literal["image", "text"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BankRows = dict[Kind, list[tuple[Column, Int64[np.ndarray, "rows"]]]]
"""Of each kind, columns of the training and their rows."""
Read = Callable[[Column, Int64[np.ndarray, "rows"]], Float[np.ndarray, "rows dim"]]


@dataclass(frozen=True)
class Bank:
    """Embeddings of training rows, normalised."""

    image: Float[Tensor, "images dim"]
    text: Float[Tensor, "texts dim"]

    @classmethod
    def of(cls, rows: BankRows, read: Read, device: torch.device) -> "Bank":
        """Read the embeddings of rows that were drawn."""
        images, texts = (
            torch.from_numpy(np.concatenate([read(*each) for each in rows[kind]])) for kind in KINDS
        )
        return cls(images.to(device).float(), texts.to(device).float())

    def offsets(
        self,
        score: Score,
        gallery: Float[Tensor, "gallery dim"],
        *,
        asked_by: Kind,
        scale: float,
    ) -> Float[Tensor, "gallery"]:
        """Return what is taken off the cosine of every query with each item.

        Args:
            score: Which.
            gallery: What is searched, normalised.
            asked_by: The kind of the queries.
            scale: Of the head: its logits are scale × cosine + bias.
        """
        queries, others = self.image, self.text
        if asked_by == "text":
            queries, others = others, queries
        if score == "dual-bank":
            queries = torch.cat([queries, others])
        step = max(1, COSINES_AT_ONCE // max(len(queries), 1))
        parts = [_offsets(score, each @ queries.T, scale) for each in torch.split(gallery, step)]
        return torch.cat(parts) if parts else gallery.new_empty(0)


def _offsets(
    score: Score, cosines: Float[Tensor, "gallery bank"], scale: float
) -> Float[Tensor, "gallery"]:
    bank = cosines.shape[1]
    if score == "csls":
        return cosines.topk(min(NEIGHBOURS, bank), dim=1).values.mean(dim=1) / 2
    return ((scale * cosines).logsumexp(dim=1) - log(bank)) / scale


def draw_bank(
    embedder: Embedder, stores: Mapping[str, FeatureStore], trained: Sequence[str], seed: int
) -> BankRows:
    """Draw the rows of a bank from those that a head was trained on.

    Args:
        embedder: The head.
        stores: Of the run, by split.
        trained: The splits of the training.
        seed: Of the draw.

    Returns:
        Up to `BANK_ROWS` images and as many captions, of all stores and caption fields alike.

    Raises:
        EvaluationError: There is no such row, or it is of another encoder.
    """
    named = embedder.checkpoint.run.get("fields", ())
    columns: dict[Kind, list[Column]] = {"image": [], "text": []}
    for store in (stores[split] for split in trained if split in stores):
        columns["image"].append(embedder.image_column(store))
        fields = [name for name in store.fields if name in named] or store.fields
        columns["text"] += [embedder.text_column(store, name) for name in fields]
    generator = np.random.default_rng(seed)
    drawn: BankRows = {
        kind: [
            (column, rows)
            for column in columns[kind]
            if len(rows := _drawn(column, -(-BANK_ROWS // len(columns[kind])), generator))
        ]
        for kind in KINDS
    }
    if not (drawn["image"] and drawn["text"]):
        raise no_bank(f"{', '.join(trained) or 'no split'} of the training")
    return drawn


def _drawn(column: Column, count: int, generator: np.random.Generator) -> Int64[np.ndarray, "rows"]:
    rows = column.ok_rows()
    blocks = np.unique(rows // BLOCK_ROWS)
    if len(blocks) > BANK_BLOCKS:
        chosen = generator.choice(blocks, BANK_BLOCKS, replace=False)
        rows = rows[np.isin(rows // BLOCK_ROWS, chosen)]
    if len(rows) > count:
        rows = np.sort(generator.choice(rows, count, replace=False))
    return rows


def embeddings_of(embedder: Embedder) -> Read:
    """Return what embeds rows of a column now."""

    def read(column: Column, rows: Int64[np.ndarray, "rows"]) -> Float[np.ndarray, "rows dim"]:
        embedded: Iterator[np.ndarray] = embedder.blocks(column, rows)
        return np.concatenate(list(embedded))

    return read


def no_bank(found: str) -> EvaluationError:
    """Return the refusal of a score that needs training rows, of which there are none."""
    return EvaluationError(
        f"A score against hubness needs rows of the training as its bank, but there are none: "
        f"{found}. A run with the features of its training split was expected. Use the plain "
        f"cosine, or name the split in align.split."
    )
