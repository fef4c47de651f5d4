"""Pictures of rows: decoded, made small and encoded anew, never served as they are."""

import io
import threading
from collections import OrderedDict

from PIL import Image

from features.errors import EvaluationError
from features.images import as_rgb, open_image, turned
from features.index import Index, SampleReader
from pipeline.explore.session import Session

SIDES = (96, 256, 768)
"""Pixels of the longer side: on the map, in the grid, of the whole row."""
QUALITY = 85
CACHE_BYTES = 64 << 20
DECODED_AT_ONCE = 2


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
        if split not in session.config.data:
            raise EvaluationError(
                f"The run has no split {split!r}. One of {list(session.config.data)} was expected. "
                f"Choose one of these."
            )
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
