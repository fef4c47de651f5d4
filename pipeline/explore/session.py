"""A run that is looked at: opened as it is needed, and again when training has a better head."""

import io
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float16, Float32, Int32, Int64
from PIL import Image

from align.checkpoint import Checkpoint, read_checkpoint
from evaluate.embedder import Embedder
from evaluate.nearest import RowSearch, open_search
from features.errors import CheckpointError, EvaluationError, StoreError, StoreNotFoundError
from features.images import as_rgb, open_image, turned
from features.index import Index, SampleReader
from features.storage.column import Column
from features.storage.place import Place
from features.store import FeatureStore
from pipeline.python import load_aligned, open_run
from pipeline.run.aligned import Aligned
from pipeline.run.config import RunConfig
from pipeline.run.folder import RunFolder, open_store, run_folder
from pipeline.search import Ranking, embeddings_file, open_embeddings, open_offsets

SIDES = (96, 256, 768)
"""Pixels of the longer side: on the map, in the grid, of the whole row."""
QUALITY = 85
CACHE_BYTES = 64 << 20
DECODED_AT_ONCE = 2


@dataclass(frozen=True)
class Searchable:
    """The embeddings of a column, and the search among them."""

    path: Path
    """File of the embeddings; its name stands for head, column and rows."""
    rows: Int64[np.ndarray, "ok"]
    """Rows of the store, in order."""
    embeddings: Float16[np.ndarray, "ok dim"]
    """Normalised; mapped from a file."""
    search: RowSearch

    def vector(self, row: int) -> Float32[np.ndarray, "dim"] | None:
        """Return the embedding of a row, None where the row is quarantined."""
        place = int(np.searchsorted(self.rows, row))
        if place == len(self.rows) or self.rows[place] != row:
            return None
        found: np.ndarray = self.embeddings[place].astype(np.float32)
        return found


class Session:
    """The parts of a run, for any number of threads; nothing of the run is changed.

    Only `run.dir/search` is written to, where embeddings are kept.
    """

    def __init__(self, run: Path, *, device: str = "auto", memory_bytes: int = 2 << 30) -> None:
        """Read the settings of a run.

        Args:
            run: Its folder.
            device: Where the encoders and the head compute.
            memory_bytes: What one search index may take.

        Raises:
            ConfigError: There is no `config.toml` of this program in the folder.
        """
        self.config: RunConfig = open_run(run, device)
        self.folder: RunFolder = run_folder(self.config)
        self.memory_bytes = memory_bytes
        self.encoding = threading.Lock()
        """Held while an encoder works, and while an image that was sent is decoded."""
        self._run, self._device = run, device
        self._opening = threading.RLock()  # held while a split is embedded, which may take long
        self._reading = threading.Lock()
        self._aligned: Aligned | None = None
        self._columns: dict[tuple[str, str | None, str], Searchable] = {}
        self._stores: dict[str, tuple[FeatureStore, int]] = {}
        self._labels: dict[tuple[str, str], np.ndarray | None] = {}

    @property
    def run_file(self) -> Path:
        """The run file that a command in a terminal is given to go on with this run."""
        return self._run / "config.toml"

    @property
    def results(self) -> Path:
        """Where the numbers of an evaluation are, once there was one."""
        return self.folder.eval / "results.json"

    @property
    def splits(self) -> list[str]:
        """Splits that have a store, those that are not trained on first."""
        there = [name for name in self.config.data if FeatureStore.is_at(self.folder.store(name))]
        trained = self.config.trained_splits
        return sorted(there, key=lambda name: name in trained)

    def store(self, split: str) -> FeatureStore:
        """Open the store of a split, as it is now.

        Raises:
            EvaluationError: The run has no such split.
            StoreError: It has no store.
        """
        self.check_split(split)
        if not FeatureStore.is_at(self.folder.store(split)):
            raise StoreNotFoundError(self.folder.store(split))
        stamp = _stamp(self.folder.store(split))
        with self._reading:
            if self._stores.get(split, (None, None))[1] != stamp:
                self._stores[split] = (open_store(self.config, self.folder, split), stamp)
            return self._stores[split][0]

    def check_split(self, split: str) -> None:
        """Check that the run has a split.

        Raises:
            EvaluationError: It has none of that name.
        """
        if split not in self.config.data:
            raise EvaluationError(
                f"The run has no split {split!r}. One of {list(self.config.data)} was expected. "
                f"Choose one of these."
            )

    def checked(self, split: str, row: int) -> FeatureStore:
        """Open the store of a split that has a row.

        Raises:
            StoreError: It has no such row, or there is none.
        """
        store = self.store(split)
        if not 0 <= row < store.rows:
            raise StoreError(
                f"{split} has no row {row}. A row from 0 to {store.rows - 1} was expected. Choose "
                f"another."
            )
        return store

    def checkpoint(self) -> Checkpoint | None:
        """Return the best head there is now, None before training has written one."""
        try:
            return Checkpoint.open(self.folder.align / self.config.eval.checkpoint)
        except CheckpointError:
            return None

    def checkpoint_sha256(self) -> str | None:
        """Return the hash of the best head there is now, None before training has written one."""
        path = self.folder.align / self.config.eval.checkpoint
        try:
            return read_checkpoint(path, lambda checkpoint: checkpoint.sha256)
        except CheckpointError:
            return None

    def aligned(self) -> Aligned:
        """Return the run with its best head, loaded anew if there is a better one.

        Raises:
            CheckpointError: There is no trained head yet.
        """
        with self._opening:
            found, aligned = self.checkpoint(), self._aligned
            if aligned is None or found is None or aligned.checkpoint.path != found.path:
                aligned = self._aligned = load_aligned(self._run, self._device)
                self.config = aligned.config  # what it was trained with, if that was since
                self._columns.clear()
            return aligned

    def images(self, split: str) -> Searchable:
        """Return the embedded images of a split; the first call embeds them."""
        return self._searchable(split, None)

    def captions(self, split: str, field: str) -> Searchable:
        """Return the embedded captions of a field; the first call embeds them."""
        return self._searchable(split, field)

    def labels(self, store: FeatureStore) -> Int32[np.ndarray, "rows"] | None:
        """Return the class of every row, -1 where unknown; None without labels. Read once."""
        known = (str(store.path), store.keys_sha256)
        with self._reading:
            if known not in self._labels:
                self._labels[known] = store.labels()
            return self._labels[known]

    def class_of(self, store: FeatureStore, row: int) -> str | None:
        """Return the name of the class of a row, None where it has none."""
        labels, names = self.labels(store), store.class_names
        if labels is None or labels[row] < 0:
            return None
        label = int(labels[row])
        return names[label] if names and label < len(names) else str(label)

    def offsets(self, split: str, field: str | None, by: Ranking) -> Float32[np.ndarray, "ok"]:
        """Return what a score takes off the cosines of the embedded rows of a column.

        Raises:
            EvaluationError: There are no features of the training for its bank.
        """
        with self._opening:
            aligned, embedder, column = self._opened(split, field)
            return open_offsets(aligned, embedder, column, column.ok_rows(), by)

    def _opened(self, split: str, field: str | None) -> tuple[Aligned, Embedder, Column]:
        aligned, store = self.aligned(), self.store(split)
        embedder = Embedder(aligned.model, aligned.checkpoint, aligned.device)
        if field is None:
            return aligned, embedder, embedder.image_column(store)
        return aligned, embedder, embedder.text_column(store, field)

    def _searchable(self, split: str, field: str | None) -> Searchable:
        with self._opening:
            known = (split, field, self.store(split).keys_sha256)
            if known not in self._columns:
                aligned, embedder, column = self._opened(split, field)
                rows = column.ok_rows()
                embeddings = open_embeddings(aligned, embedder, column, rows)
                path = embeddings_file(aligned, column, rows)
                search = open_search(embeddings, path.with_suffix(".faiss"), self.memory_bytes)
                self._columns[known] = Searchable(path, rows, embeddings, search)
            return self._columns[known]


def _stamp(store: Place) -> int:
    """Return what changes when rows come to a store; under a URL it is opened once."""
    return (store / "zarr.json").stat().st_mtime_ns if isinstance(store, Path) else 0


class Pictures:
    """Thumbnails of the rows that the run's index knows, the last ones kept in memory."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._readers: dict[str, SampleReader] = {}
        self._cache: OrderedDict[tuple[str, int, int], bytes] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()
        self._decoding = threading.Semaphore(DECODED_AT_ONCE)

    def jpeg(self, split: str, row: int, side: int) -> bytes | None:
        """Return the picture of a row as a small JPEG, None where the row has no image.

        Args:
            split: Of the run.
            row: Of its store.
            side: One of `SIDES`; larger pictures are made smaller, never the other way round.

        Raises:
            EvaluationError: The run has no such split or row.
            SourceError: The source is not as it was when it was indexed.
            ImageFault: The image is damaged.
        """
        place = (split, row, side)
        with self._lock:
            if place in self._cache:
                self._cache.move_to_end(place)
                return self._cache[place]
        with self._decoding:
            data = self._reader(split, row).read_row(row)
            if data is None:
                return None
            made = _small(data, side, self._session.config.extract.max_pixels)
        self._keep(place, made)
        return made

    def _reader(self, split: str, row: int) -> SampleReader:
        session = self._session
        session.check_split(split)
        with self._lock:
            if split not in self._readers:
                self._readers[split] = SampleReader(
                    Index.open(session.folder.index(split)),
                    max_pixels=session.config.extract.max_pixels,
                )
            reader = self._readers[split]
        if not 0 <= row < reader.index.rows:
            raise EvaluationError(
                f"{split} has no row {row}. A row from 0 to {reader.index.rows - 1} was expected. "
                f"Choose one of these."
            )
        return reader

    def _keep(self, place: tuple[str, int, int], made: bytes) -> None:
        with self._lock:
            if place in self._cache:
                return
            self._cache[place] = made
            self._cached_bytes += len(made)
            while self._cached_bytes > CACHE_BYTES:
                _, oldest = self._cache.popitem(last=False)
                self._cached_bytes -= len(oldest)


def _small(data: bytes, side: int, max_pixels: int) -> bytes:
    image = open_image(data, max_pixels=max_pixels)
    image.draft("RGB", (side, side))  # a large JPEG is decoded at a fraction of its size
    small = turned(as_rgb(image), image)  # as every viewer shows it
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return buffer.getvalue()
