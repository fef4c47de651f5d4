"""The passes of stage one: what each is, and how fast its phases are on this machine."""

import itertools
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import zarr

from features.config import ImageEncoderConfig, TextEncoderConfig
from features.device.cuda import is_gpu
from features.encoders import ImageEncoder, TextEncoder, load_image_encoder, load_text_encoder
from features.encoders.backends import backend_of
from features.errors import SailError
from features.images import ImageFault
from features.index import Index, SampleReader, build_index
from features.status import Status
from features.storage.column import Column, create_column
from pipeline.planning.estimate import Phase, hours
from pipeline.planning.sizes import image_size, text_size
from pipeline.run.config import RunConfig
from pipeline.run.cpu import usable_processors
from pipeline.run.device import prepare_device
from pipeline.run.folder import RunFolder

T = TypeVar("T")
SAMPLES = 512
ROWS_READ_AT_ONCE = 32
COMPUTED = frozenset({"decode", "tokenise", "encode"})
"""Phases that share the cores where a processor encodes."""
logger = logging.getLogger(__name__)
ASSUMED_TOKENS = {"short": 16, "long": 120}
ASSUMED_TOKENS_OF_OTHERS = 40
ASSUMED_MOST_TOKENS = 256


@dataclass(frozen=True)
class CaptionRates:
    """Captions a second."""

    tokenise: float
    encode: float
    tokens: float
    """Mean length."""
    captions: int
    """Different captions that were encoded."""


def measure_images(encoder: ImageEncoder, index: Index, *, seconds: float) -> dict[str, float]:
    """Read, decode and encode images of an index; none if none of the first can be decoded.

    Returns:
        Images a second: `read` and `decode` by one thread, `copy` to the device if that is a GPU,
        and `encode`.
    """
    part = seconds / 3
    images, read_seconds = _first_images(SampleReader(index, max_pixels=encoder.max_pixels), part)
    if not images:
        return {}
    pixels: list[np.ndarray] = []

    def decode_one(data: bytes) -> None:
        try:
            picture = encoder.prepare(data)
        except ImageFault:
            return
        if len(pixels) < encoder.batch_size:
            pixels.append(picture)

    decode_one(images[0])  # the warm-up: libraries load with the first
    decoded = _per_second(decode_one, itertools.cycle(images), part)
    if not pixels:
        return {}
    batch = torch.from_numpy(np.stack(pixels))
    _encode(encoder, batch)  # the warm-up
    batches = _per_second(lambda one: _encode(encoder, one), itertools.repeat(batch), part)
    rates = {"read": len(images) / read_seconds, "decode": decoded}
    if is_gpu(encoder.device):
        rates["copy"] = _copied_per_second(batch, encoder.device)
    return rates | {"encode": batches * len(batch)}


def measure_captions(
    encoder: TextEncoder, captions: Sequence[str], *, seconds: float
) -> CaptionRates | None:
    """Tokenise and encode captions; None if all are empty."""
    texts = [caption for caption in dict.fromkeys(captions) if caption.strip()]
    if not texts:
        return None
    started = time.perf_counter()
    tokens = encoder.tokenise(texts)
    tokenised = len(texts) / _since(started)
    few = tokens[: max(1, min(len(tokens), 64))]
    encoder.encode_tokens(few)  # the warm-up
    rate, size, next_size = 0.0, 0, len(few)
    deadline = time.perf_counter() + seconds
    while next_size > size:  # as many at once as there is time for; fewer would say less
        size = next_size
        chosen = list(itertools.islice(itertools.cycle(tokens), size))
        started = time.perf_counter()
        encoder.encode_tokens(chosen)
        rate = size / _since(started)
        next_size = min(4 * size, round(rate * (deadline - time.perf_counter())))
    lengths = [len(each) for each in tokens]
    return CaptionRates(tokenised, rate, float(np.mean(lengths)), len(texts))


def measure_writing(folder: Path, dim: int, rows_per_chunk: int, *, seconds: float) -> float:
    """Return the rows a second of a column that is written at `folder`, an empty one."""
    rows = 16 * rows_per_chunk
    create_column(zarr.create_group(folder).create_group("image/trial"), rows, dim, rows_per_chunk)
    column = Column(folder, "image/trial")
    features = np.ones((rows_per_chunk, dim), dtype=np.float16)
    status = np.full(rows_per_chunk, Status.OK, dtype=np.uint8)
    chunks = itertools.cycle(range(column.num_chunks))
    per_second = _per_second(lambda chunk: column.write(chunk, features, status), chunks, seconds)
    return per_second * rows_per_chunk


def _encode(encoder: ImageEncoder, batch: torch.Tensor) -> None:
    """Encode a batch for all columns, and wait until that is done."""
    for features in encoder.encode(batch):
        features.cpu()


def _first_images(reader: SampleReader, seconds: float) -> tuple[list[bytes], float]:
    """Read images from the front of an index; return them, and the time it took."""
    images: list[bytes] = []
    started = time.perf_counter()
    stop = min(reader.index.rows, SAMPLES)
    for start in range(0, stop, ROWS_READ_AT_ONCE):
        found = reader.read(start, min(start + ROWS_READ_AT_ONCE, stop))
        images += [image for image in found if image]
        if _since(started) > seconds:
            break
    return images, _since(started)


def _per_second(work: Callable[[T], object], items: Iterator[T], seconds: float) -> float:
    """Do work on items one after the other for so long; return how many a second."""
    count, started = 0, time.perf_counter()
    while count == 0 or _since(started) < seconds:
        work(next(items))
        count += 1
    return count / _since(started)


def _copied_per_second(batch: torch.Tensor, device: torch.device) -> float:
    pinned = batch.pin_memory()
    started = time.perf_counter()
    for _ in range(10):
        pinned.to(device, non_blocking=True)
    torch.cuda.synchronize(device)
    return 10 * len(batch) / _since(started)


def _since(started: float) -> float:
    return max(time.perf_counter() - started, 1e-9)


@dataclass
class Pass:
    """One pass of an encoder over rows: all columns of an image encoder, or one caption field."""

    name: str
    rows: int
    dims: dict[str, int | None]
    """Length of the features of each column that it fills."""
    flops: float | None
    """Of one row; None where the encoder is neither known nor here."""
    flops_from: str
    tokens: float | None = None
    tokens_from: str | None = None
    phases: list[Phase] = field(default_factory=list)
    """On this machine, where they were measured."""
    per_second: dict[str, float] = field(default_factory=dict)
    decoded_per_core: float | None = None
    """Images a second, where they were decoded."""


@contextmanager
def sample_index(config: RunConfig, folder: RunFolder) -> Iterator[Index | None]:
    """Yield an index of real rows of the training split, None where its source is not there.

    Of several that are mixed it is the first.
    """
    split = (*config.trained_splits, *config.data)[0]
    source, path = config.data[split], folder.index(split)
    if path.is_file():
        yield Index.open(path)
        return
    with tempfile.TemporaryDirectory(prefix="sail-plan-") as temporary:
        few = source.model_copy(update={"rows": min(SAMPLES, source.rows or SAMPLES)})
        try:
            reader = few.open(folder=Path(temporary))
            index = build_index(reader, Path(temporary) / "sample.parquet")
        except SailError as error:
            logger.warning(
                "nothing is measured on this machine, since there are no rows: %s", error
            )
            index = None
        yield index


class Measuring:
    """Sizes an encoder, and measures it where it and data are on this machine.

    Args:
        config: The recipe.
        index: Real rows of the training split, if its source is there.
        seconds: What one encoder may take, once it is loaded.
    """

    def __init__(self, config: RunConfig, index: Index | None, seconds: float) -> None:
        self._config = config
        self._index = index
        self._seconds = seconds
        self._device = prepare_device(config.run)
        self._on_cpu = self._device.type == "cpu"
        self._cores = usable_processors()
        self._workers = config.extract.workers or self._cores

    def image(self, name: str, rows: int) -> Pass:
        """Return the pass of an image encoder."""
        settings = self._config.encoders.image[name]
        size = image_size(name, settings)
        flops = size.flops(1) if size.flops else None
        dims = {f"image/{column}": dim for column, dim in size.dims.items()}
        made = Pass(f"image/{name}", rows, dims, flops, size.found_in)
        if self._index is None or not _is_here(settings):
            return made
        limit = self._config.extract.max_pixels
        encoder = load_image_encoder(name, settings, self._device, limit)
        made.dims = {f"image/{column.name}": column.dim for column in encoder.columns}
        if rates := measure_images(encoder, self._index, seconds=self._seconds):
            made.decoded_per_core = rates["decode"]
            rates["read"] *= self._workers
            rates["decode"] *= min(self._workers, self._cores)
            self._add(made, rates)
        return made

    def text(self, name: str, rows: int) -> list[Pass]:
        """Return the passes of a text encoder, one for each caption field."""
        settings = self._config.encoders.text[name]
        size = text_size(settings)
        captions = self._captions()
        is_measured = self._index is not None and _is_here(settings)
        encoder = load_text_encoder(name, settings, self._device) if is_measured else None
        passes = []
        for caption_field, texts in captions.items():
            rates = None
            if encoder is not None:
                seconds = self._seconds / len(captions)
                rates = measure_captions(encoder, texts, seconds=seconds)
            tokens, origin = _tokens(settings, caption_field, texts, rates)
            column = f"text/{name}/{caption_field}"
            dims = dict.fromkeys([name, *settings.also], size.dims[""])
            if encoder is not None:
                dims = {each.name: each.dim for each in encoder.columns}
            filled = {f"text/{each}/{caption_field}": dim for each, dim in dims.items()}
            flops = size.flops(tokens) if size.flops else None
            made = Pass(column, rows, filled, flops, size.found_in, tokens, origin)
            if rates is not None:
                self._add(made, {"tokenise": rates.tokenise, "encode": rates.encode})
            passes.append(made)
        return passes

    def _captions(self) -> dict[str, list[str]]:
        """Return some captions of each field; none where there is no data."""
        if self._index is None:
            source = self._config.data[(*self._config.trained_splits, *self._config.data)[0]]
            return {name: [] for name in source.expected_fields or ("caption",)}
        stop = min(SAMPLES, self._index.rows)
        names = tuple(f"caption/{name}" for name in self._index.fields)
        table = self._index.rows_between(0, stop, names) if names else None
        return {
            name: table.column(f"caption/{name}").to_pylist() if table is not None else []
            for name in self._index.fields
        }

    def _add(self, made: Pass, per_second: dict[str, float]) -> None:
        """Note what was measured of a pass, and measure writing too."""
        place = self._config.extract.store or self._config.run.dir
        if isinstance(place, Path):  # nothing is put under a URL to find out
            dim = sum(each or 0 for each in made.dims.values())
            chunk, seconds = self._config.extract.rows_per_chunk, self._seconds / 10
            above = existing_folder(place)
            with tempfile.TemporaryDirectory(prefix=".sail-plan-", dir=above) as folder:
                rate = measure_writing(Path(folder), dim, chunk, seconds=seconds)
            per_second = per_second | {"write": rate}
        made.per_second = per_second
        made.phases = [
            Phase(name, hours(made.rows, rate), self._on_cpu and name in COMPUTED)
            for name, rate in per_second.items()
        ]


def _is_here(settings: ImageEncoderConfig | TextEncoderConfig) -> bool:
    """Return whether an encoder can be loaded without the hub."""
    return backend_of(settings.model).is_here(settings.model, settings.revision)


def _tokens(
    settings: TextEncoderConfig, name: str, texts: list[str], rates: CaptionRates | None
) -> tuple[float, str]:
    """Return the mean tokens of a caption, and where that is from."""
    if rates is not None:
        return rates.tokens, f"mean of {rates.captions} captions"
    most = settings.max_length if isinstance(settings.max_length, int) else ASSUMED_MOST_TOKENS
    if words := [len(text.split()) for text in texts if text.strip()]:
        return min(4 / 3 * sum(words) / len(words) + 2, most), "words of captions"
    assumed = ASSUMED_TOKENS.get(name, ASSUMED_TOKENS_OF_OTHERS)
    return min(assumed, most), "assumed"


def existing_folder(path: Path) -> Path:
    """Return the nearest folder above a path that is there."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path
