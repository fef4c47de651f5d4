"""Sums, covariances and the cross-covariance of normalised features, in one pass over the stores.

They are all that the closed form (see `closed_form`) needs, they add up over rows, and they are
kept: a pass that was interrupted goes on, and rows that were appended are added to those before.
"""

import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Float64, Int64
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from align.columns import Columns, Selection
from align.heads import standardised
from align.processes import Ring
from features.device.cuda import set_current
from features.errors import CheckpointError, TrainingError
from features.storage.column import Column
from features.storage.files import write
from features.storage.reading import Expected, read_safetensors
from features.store import store_key_hashes

logger = logging.getLogger(__name__)
BLOCK_ROWS = 4096
"""Rows that are read and added at once; a block of them and the next one are in memory."""
BLOCKS_BETWEEN_SAVES = 256
"""After as many blocks (1,048,576 rows) what there is so far is written down."""
VERSION = 1
IDENTITY = "identity"
KEPT = Expected("Moments that were written whole", "They are computed again.", CheckpointError)


@dataclass(frozen=True)
class Moments:
    """Weighted sums over rows, of normalised features (mean 0 and variance 1 within each row).

    A row with an image x and captions t₁ … t_c of the weights a₁ … a_c, which sum to 1, adds what
    the fields say. Sums of float64 on one device, changed in place by `add`.
    """

    rows: Float64[Tensor, ""]
    """Σ 1"""
    image: Float64[Tensor, "image_dim"]
    """Σ x"""
    text: Float64[Tensor, "text_dim"]
    """Σ Σ_k a_k t_k"""
    image_image: Float64[Tensor, "image_dim image_dim"]
    """Σ x xᵀ"""
    text_text: Float64[Tensor, "text_dim text_dim"]
    """Σ Σ_k a_k t_k t_kᵀ, of each caption by itself"""
    image_text: Float64[Tensor, "image_dim text_dim"]
    """Σ x (Σ_k a_k t_k)ᵀ"""

    @classmethod
    def zeros(cls, image_dim: int, text_dim: int, device: torch.device | str = "cpu") -> "Moments":
        """Return the moments of no rows, for features of these lengths."""
        image, text = (image_dim,), (text_dim,)
        shapes = [(), image, text, image + image, text + text, image + text]
        return cls(*(torch.zeros(each, dtype=torch.float64, device=device) for each in shapes))

    def add(
        self,
        image: Float[Tensor, "rows image_dim"],
        text: Float[Tensor, "rows captions text_dim"],
        weights: Float[Tensor, "rows captions"],
    ) -> None:
        """Add rows.

        Args:
            image: Features, on the device of the sums.
            text: Features of the captions.
            weights: Of the captions of a row, in proportion; one of them at least is above 0.
        """
        image = normalised(image)
        shares = weights.double()
        shares = shares / shares.sum(dim=1, keepdim=True)
        text = normalised(text)
        mean = (shares[:, None] @ text).squeeze(1)
        single = text.flatten(0, 1) * shares.flatten().sqrt()[:, None]
        self.rows.add_(len(image))
        self.image.add_(image.sum(dim=0))
        self.text.add_(mean.sum(dim=0))
        self.image_image.addmm_(image.T, image)
        self.text_text.addmm_(single.T, single)
        self.image_text.addmm_(image.T, mean)

    def times(self, factor: float) -> "Moments":
        """Return the moments with every row weighted by a factor."""
        return self._with(lambda name: factor * getattr(self, name))

    def __add__(self, other: "Moments") -> "Moments":
        return self._with(lambda name: getattr(self, name) + getattr(other, name))

    def __sub__(self, other: "Moments") -> "Moments":
        return self._with(lambda name: getattr(self, name) - getattr(other, name))

    def to(self, device: torch.device | str) -> "Moments":
        """Return them on another device."""
        return self._with(lambda name: getattr(self, name).to(device))

    def sum_over(self, ring: Ring) -> None:
        """Replace the sums by those over all processes."""
        ring.sum_in_place(getattr(self, each.name) for each in fields(self))

    def _with(self, value: Callable[[str], Tensor]) -> "Moments":
        return replace(self, **{each.name: value(each.name) for each in fields(self)})


def normalised(features: Float[Tensor, "*rows dim"]) -> Float64[Tensor, "*rows dim"]:
    """Give every row mean 0 and variance 1, as the LayerNorm in front of the heads does."""
    return F.layer_norm(features.double(), features.shape[-1:])


@dataclass(frozen=True)
class PairedRows:
    """The rows of a store whose moments are wanted."""

    columns: Columns
    rows: Bool[np.ndarray, "rows"]
    """Which."""
    weights: Float[np.ndarray, "rows fields"]
    """Of each caption, in proportion; 0 for one that does not count."""

    @classmethod
    def trained(
        cls, columns: Columns, selection: Selection, field_weights: dict[str, float]
    ) -> "PairedRows":
        """Return the rows that a head is trained on, with the weights that the loss has."""
        of_fields = [field_weights.get(name, 1.0) for name in columns.fields]
        weights = selection.text_ok * np.array(of_fields, dtype=np.float32)
        return cls(columns, selection.train & (weights.sum(axis=1) > 0), weights)

    def moments(self, kept: Path | None, device: torch.device, ring: Ring) -> Moments:
        """Read the rows once, block by block, and sum up.

        Memory: 8 (image_dim² + text_dim² + image_dim·text_dim) bytes for the sums, and for two
        blocks of 4,096 rows their features in float16; for one of them in float64 as well, twice.

        Args:
            kept: File of the sums so far, which is read before and written during the pass: what
                it has of these rows is not read again. None to keep nothing.
            device: Where the products are formed.
            ring: The processes that share the rows.

        Raises:
            StoreError: A chunk is damaged.
            TrainingError: A feature is not a finite number, or there are no rows.
        """
        if not self.rows.any():
            raise TrainingError(
                f"No row of {self.columns.store.path} has a caption whose field has a weight. One "
                f"at least was expected. Correct align.loss.field_weights or align.fields."
            )
        first, sums = self._kept(kept) if ring.leads else (0, None)
        first = ring.greatest(first)[0]
        sizes = self.columns.image.dim, self.columns.text[0].dim
        sums = (sums or Moments.zeros(*sizes)).to(device)
        every = self.columns.store.rows
        while first < every:
            stop = min(every, (first // BLOCK_ROWS + BLOCKS_BETWEEN_SAVES) * BLOCK_ROWS)
            if not ring.leads:
                sums = Moments.zeros(*sizes, device)
            blocks = list(_blocks(first, stop))[ring.rank :: ring.size]
            for rows, image, text in self._read(blocks, device):
                self._add(sums, rows, image, text, device)
            sums.sum_over(ring)
            first = stop
            if kept is not None and ring.leads:
                write(kept, self._written(sums, stop))
        return sums

    def of(self, chosen: Int64[np.ndarray, "some_rows"], device: torch.device) -> Moments:
        """Return the moments of some of the rows, which are read at once."""
        sums = Moments.zeros(self.columns.image.dim, self.columns.text[0].dim, device)
        image, text = _features(self.columns, lambda column: column.rows_at(chosen))
        self._add(sums, chosen, image, text, device)
        return sums

    def _read(
        self, blocks: Sequence[range], device: torch.device
    ) -> Iterator[tuple[Int64[np.ndarray, "rows"], np.ndarray, np.ndarray]]:
        """Yield the wanted rows of each block with their features; the next is read meanwhile."""

        def read(block: range) -> Any:
            rows = block.start + np.flatnonzero(self.rows[block.start : block.stop])
            return rows, *_features(self.columns, lambda column: column.rows_at(rows))

        with ThreadPoolExecutor(1, "sail-moments", set_current, (device,)) as reader:
            coming = deque(reader.submit(read, block) for block in blocks[:1])
            for number in range(len(blocks)):  # none for a process that has no share
                block = coming.popleft().result()
                coming.extend(reader.submit(read, it) for it in blocks[number + 1 : number + 2])
                yield block

    def _add(
        self,
        sums: Moments,
        rows: Int64[np.ndarray, "rows"],
        image: Float16[np.ndarray, "rows image_dim"],
        text: Float16[np.ndarray, "rows captions text_dim"],
        device: torch.device,
    ) -> None:
        weights = self.weights[rows]
        finite = np.isfinite(image).all(axis=1) & np.isfinite(text).all(axis=2).all(axis=1)
        if not finite.all():
            store = self.columns.store
            row = int(rows[finite.argmin()])
            raise TrainingError(
                f"A feature of row {row} of {store.path}, key "
                f"{str(store.keys(row, row + 1)[0])!r}, is not finite. A number was expected. "
                f"Extract it again, or see the row with `sail inspect {store.path} --row {row}`."
            )
        if len(rows):
            images, texts, shares = (
                torch.from_numpy(each).to(device) for each in (image, text, weights)
            )
            images = standardised(images.double(), self.columns.image.dims)
            texts = standardised(texts.double(), self.columns.text[0].dims)
            sums.add(images, texts, shares)

    def _kept(self, path: Path | None) -> tuple[int, Moments | None]:
        """Return how many rows of the store a file has the sums of, and these."""
        if path is None or not path.is_file():
            return 0, None
        try:
            tensors = read_safetensors(path, KEPT)
            identity = json.loads(tensors.pop(IDENTITY).numpy().tobytes())
            first, sums = int(identity["store_rows"]), Moments(**tensors)
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            logger.warning("%s is damaged (%s): the moments are computed again", path, error)
            return 0, None
        if identity != json.loads(json.dumps(self._identity(sums, first))):
            return 0, None
        if first:
            logger.info("the moments of the first %s rows are in %s", f"{first:,}", path)
        return first, sums

    def _written(self, sums: Moments, stop: int) -> bytes:
        identity = json.dumps(self._identity(sums, stop)).encode()
        tensors = {each.name: getattr(sums, each.name).cpu() for each in fields(sums)}
        return save(tensors | {IDENTITY: torch.frombuffer(bytearray(identity), dtype=torch.uint8)})

    def _identity(self, sums: Moments, stop: int) -> dict[str, Any]:
        """Say what the sums of the first `stop` rows were made from, and what their hash is."""
        columns, digest = self.columns, hashlib.sha256()
        for each in fields(sums):
            digest.update(getattr(sums, each.name).cpu().numpy().tobytes())
        chosen = hashlib.sha256(store_key_hashes(columns.store)[:stop].tobytes())
        chosen.update(self.rows[:stop].tobytes())
        chosen.update(np.where(self.rows[:stop, None], self.weights[:stop], 0).tobytes())
        return {
            "version": VERSION,
            "sha256": digest.hexdigest(),
            "store_rows": stop,
            "rows_sha256": chosen.hexdigest(),
            "fields": list(columns.fields),
            "columns": [
                [each.name, each.dim, each.dtype.name, each.fingerprint.deciding]
                for joined in (columns.image, *columns.text)
                for each in joined.parts
            ],
        }


def _blocks(first: int, stop: int) -> Iterator[range]:
    """Cut rows into blocks that begin at multiples of `BLOCK_ROWS`, but for the first."""
    while first < stop:
        end = min(stop, (first // BLOCK_ROWS + 1) * BLOCK_ROWS)
        yield range(first, end)
        first = end


def _features(
    columns: Columns, read: Callable[[Column], np.ndarray]
) -> tuple[Float16[np.ndarray, "rows image_dim"], Float16[np.ndarray, "rows captions text_dim"]]:
    return read(columns.image), np.stack([read(column) for column in columns.text], axis=1)
