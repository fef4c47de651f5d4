"""Embeddings of a user's own images or sentences, as a file for other programs."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from jaxtyping import Float32, Num

from features.errors import EncoderError, SourceError
from features.sources.base import IMAGE_SUFFIXES, is_left_behind
from features.storage.files import (
    appearing,
    delete,
    remove_leftovers,
    replacing_folder,
    without_empty_folders,
)
from features.storage.reading import Expected, read_text
from features.terminal import harmless
from pipeline.interrupt import StopRequest
from pipeline.progress import ProgressLine
from pipeline.run.aligned import Aligned
from pipeline.run.cpu import usable_processors
from pipeline.stores.npy import write_header

logger = logging.getLogger(__name__)
ITEMS_AT_ONCE = 1024
PARTS = ("name", "embedding")
"""Arrays of a `.zarr`."""
Blocks = Iterator[tuple[list[str], Float32[np.ndarray, "items dim"]]]


@dataclass(frozen=True)
class Written:
    """What came of a call."""

    path: Path
    items: int
    unusable: int
    """Images that could not be read: their embeddings are not-a-number (null in parquet)."""
    seconds: dict[str, float]
    """How long it took, by what was done: `load`, `decode` or `tokenise`, `encode`, `write`."""


class _Work:
    """Counts what is done, in a line of progress, and the seconds of each part of it."""

    def __init__(self, out: Path, count: int, unit: str) -> None:
        self._line = ProgressLine(f"embed {out.name}", count, unit)
        self._parts: dict[str, float] = {}
        self._begun = time.perf_counter()

    def __enter__(self) -> "_Work":
        self._line.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._line.__exit__(*error)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add to the seconds of a part."""
        begun = time.perf_counter()
        yield
        self._parts[name] = self._parts.get(name, 0.0) + time.perf_counter() - begun

    def advance(self, count: int) -> None:
        """Say that some items are done."""
        self._line.advance(count)

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part; what is left of the time went into writing."""
        rest = time.perf_counter() - self._begun - sum(self._parts.values())
        every = self._parts | {"write": max(0.0, rest)}
        logger.info(
            "seconds: %s", ", ".join(f"{name} {seconds:.1f}" for name, seconds in every.items())
        )
        return {name: round(seconds, 3) for name, seconds in every.items()}


def image_files(folder: Path) -> list[Path]:
    """Return the images under a folder, in the order of their names.

    Raises:
        SourceError: There are none.
    """
    every = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [
        path
        for path in every
        if path.suffix[1:].lower() in IMAGE_SUFFIXES
        and not any(map(is_left_behind, path.relative_to(folder).parts))
    ]
    if others := len(every) - len(files):
        logger.info("%s: %d files that are no images, or hidden, are left out", folder, others)
    if not files:
        raise SourceError(
            f"There is no image under {folder}. Files that end in one of "
            f"{', '.join(sorted(IMAGE_SUFFIXES))} were expected. Correct --images."
        )
    return files


def name_of(path: Path) -> str:
    """Return the name under which an image is written: bytes that are not UTF-8 as hexadecimal."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


def sentences(file: Path) -> list[str]:
    """Return the lines of a text file that are not empty; the number of the others is logged.

    Raises:
        SourceError: It cannot be read, is not UTF-8, or has none.
    """
    expected = Expected(
        "A text file in UTF-8 with one sentence a line", "Correct --texts.", SourceError
    )
    lines = [line.strip() for line in read_text(file, expected).split("\n")]
    if not (found := [line for line in lines if line]):
        raise SourceError(
            f"{file} has no line that is not empty. One sentence a line was expected. Fill it."
        )
    if empty := len(lines) - len(found) - (not lines[-1]):
        logger.warning("%s: %d empty lines are left out; the rows count without them", file, empty)
    return found


def embed_images(aligned: Aligned, files: Sequence[Path], out: Path, stop: StopRequest) -> Written:
    """Write one embedding per image, in order.

    Args:
        aligned: The run.
        files: The images.
        out: `.npy` (names beside it, in `.names.txt`), `.parquet` or `.zarr`.
        stop: Asked between batches.

    Raises:
        SourceError: `out` ends in something else.
        Stopped: A signal came; nothing was written.
    """
    unusable = 0
    work = _Work(out, len(files), "images")

    def prepare(path: Path) -> Num[np.ndarray, "3 height width"] | None:
        try:
            return aligned.prepare(path)
        except EncoderError as error:
            logger.warning("%s", error)
            return None

    def blocks() -> Blocks:
        nonlocal unusable
        with ThreadPoolExecutor(usable_processors()) as pool:
            for start in range(0, len(files), aligned.image_batch):
                stop.check()
                part = files[start : start + aligned.image_batch]
                with work.timed("decode"):
                    prepared = list(pool.map(prepare, part))
                ok = np.array([image is not None for image in prepared])
                embeddings = np.full((len(part), aligned.dim), np.nan, dtype=np.float32)
                if ok.any():
                    usable = [image for image in prepared if image is not None]
                    with work.timed("encode"):
                        embeddings[ok] = aligned.encode_pixels(usable)
                unusable += int((~ok).sum())
                yield [name_of(path) for path in part], embeddings
                work.advance(len(part))

    with work.timed("load"):
        _ = aligned.image_encoder
    with work:
        _write(out, blocks(), len(files), aligned.dim)
    return Written(out, len(files), unusable, work.seconds())


def embed_sentences(
    aligned: Aligned, texts: Sequence[str], out: Path, stop: StopRequest
) -> Written:
    """Write one embedding per sentence, in order.

    Takes and raises what `embed_images` does.
    """
    work = _Work(out, len(texts), "sentences")

    def blocks() -> Blocks:
        for start in range(0, len(texts), ITEMS_AT_ONCE):
            stop.check()
            part = list(texts[start : start + ITEMS_AT_ONCE])
            with work.timed("tokenise"):
                tokens = aligned.text_encoder.tokenise(part)
            with work.timed("encode"):
                embeddings = aligned.encode_tokens(tokens)
            yield part, embeddings
            work.advance(len(part))

    with work.timed("load"):
        _ = aligned.text_encoder
    with work:
        _write(out, blocks(), len(texts), aligned.dim)
    return Written(out, len(texts), 0, work.seconds())


def _check_out(out: Path) -> None:
    """Refuse a place that embeddings cannot be written to.

    Raises:
        SourceError: It ends in no form of them, or there is something else than embeddings.
    """
    if out.suffix not in WRITERS:
        raise SourceError(
            f"{out} ends in {out.suffix!r}. One of {', '.join(WRITERS)} was expected. Give --out "
            f"such a name."
        )
    if out.suffix == ".zarr":
        is_free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
        is_taken = not is_free and not all((out / name / "zarr.json").is_file() for name in PARTS)
    else:
        is_taken = out.is_dir()
    if is_taken:
        raise SourceError(
            f"There is something at {out} that is no file of embeddings. A new place, or earlier "
            f"embeddings, were expected. Choose another --out."
        )


def _write(out: Path, blocks: Blocks, count: int, dim: int) -> None:
    _check_out(out)
    with without_empty_folders(out):
        if out.parent.is_dir():
            remove_leftovers(out.parent)
        WRITERS[out.suffix](out, blocks, count, dim)


def _write_npy(out: Path, blocks: Blocks, count: int, dim: int) -> None:
    with appearing(out) as partial, partial.open("wb") as file:
        write_header(file, "<f4", (count, dim))
        with appearing(out.with_suffix(".names.txt")) as partial_names:
            with partial_names.open("w", encoding="utf-8") as names_file:
                for names, embeddings in blocks:
                    file.write(np.ascontiguousarray(embeddings, dtype="<f4").data)
                    names_file.writelines(f"{harmless(name)}\n" for name in names)
            file.flush()
            delete(out)  # so that embeddings never lie beside the names of others


def _write_parquet(out: Path, blocks: Blocks, _count: int, dim: int) -> None:
    vectors = pa.list_(pa.float32(), dim)
    schema = pa.schema([("name", pa.string()), ("embedding", vectors)])
    with appearing(out) as partial, pq.ParquetWriter(partial, schema) as writer:
        for names, embeddings in blocks:
            mask = pa.array(np.isnan(embeddings[:, 0]))
            column = pa.FixedSizeListArray.from_arrays(
                pa.array(embeddings.ravel()), dim, mask=mask
            ).cast(vectors)
            writer.write_batch(pa.record_batch([pa.array(names), column], schema=schema))


def _write_zarr(out: Path, blocks: Blocks, count: int, dim: int) -> None:
    size = min(count, ITEMS_AT_ONCE)
    with replacing_folder(out) as folder:
        group = zarr.open_group(folder, mode="w", zarr_format=3)
        every = group.create_array("name", shape=(count,), chunks=(size,), dtype="string")
        vectors = group.create_array(
            "embedding", shape=(count, dim), chunks=(size, dim), dtype="float32"
        )
        start = 0
        for names, embeddings in blocks:
            part = slice(start, start + len(names))
            every[part] = np.array(names, dtype=np.dtypes.StringDType())
            vectors[part] = embeddings
            start = part.stop


WRITERS: dict[str, Callable[[Path, Blocks, int, int], None]] = {
    ".npy": _write_npy,
    ".parquet": _write_parquet,
    ".zarr": _write_zarr,
}
