"""What a run will cost, before anything is spent: `sail plan`."""

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from align.config import AlignConfig
from align.start.defaults import settled
from features.device.cuda import is_gpu
from features.errors import SailError, SourceError
from features.index import Index
from features.sources import Counts, Source, SourceReader
from features.storage.files import version
from features.storage.joined_column import BESIDE
from features.storage.parallel import in_order
from features.storage.place import Place
from pipeline.planning.estimate import (
    BYTES_PER_VALUE,
    ENCODER_UTILISATION,
    GPUS,
    HEAD_UTILISATION,
    bottleneck,
    column_bytes,
    column_hours,
    head_flops,
    hours,
    training_flops,
)
from pipeline.planning.passes import Measuring, Pass, existing_folder, sample_index
from pipeline.planning.step_memory import StepMemory, room_of_step, sizes_at_once, step_memory
from pipeline.run.config import RunConfig
from pipeline.run.cpu import usable_processors
from pipeline.run.device import prepare_device
from pipeline.run.folder import RunFolder, run_folder

FILES_SAMPLED = 3
SAMPLES_AT_LEAST = 100
LITTLE_SAVED = 0.95
"""Halving the rows in the heads is not tried further once a step keeps this share of its memory."""
ASSUMED_DECODED_PER_CORE = 150.0
"""Images a second; photographs of about half a megapixel, where none was there to be measured."""


@dataclass(frozen=True)
class RowCount:
    """The rows of a split."""

    count: int
    found_in: str
    """Where the number comes from, in words."""
    is_exact: bool


def rows_of(index: Path, source: Source, *, given: int | None, seconds: float) -> RowCount:
    """Return the rows of a split.

    Args:
        index: Where its index is, if it was indexed.
        source: Its source.
        given: A number that is meant instead, if any.
        seconds: What listing may take.

    Raises:
        SailError: Neither a number nor an index nor the source is there.
    """
    if given is not None:
        return RowCount(given, "as given", is_exact=True)
    if index.is_file():
        return RowCount(Index.open(index).rows, "its index", is_exact=True)
    if source.known_rows is not None:
        return RowCount(source.known_rows, "the recipe", is_exact=True)
    found = listed_rows(source.open(), seconds)
    if source.share is not None:
        low, high = source.share
        found = RowCount(
            round(found.count * (high - low)), f"{found.found_in}, by `share`", is_exact=False
        )
    if source.rows is not None and source.rows < found.count:
        found = RowCount(source.rows, "`rows` of the source", found.is_exact)
    return found


def listed_rows(reader: SourceReader[Any], seconds: float) -> RowCount:
    """List some files, and take the others to have as many rows for their bytes."""
    files = list(reader.files)
    last = len(files) - 1
    chosen = sorted({0, last // 2, last})[:FILES_SAMPLED]
    rows, sampled_bytes, is_whole = 0, 0.0, True
    deadline = time.monotonic() + seconds
    for number in chosen:
        count, share = _count(reader, files[number], deadline)
        rows += count
        sampled_bytes += share * _file_bytes(files[number])
        is_whole &= share == 1.0
    if is_whole and len(chosen) == len(files):
        return RowCount(rows, "listing its source", is_exact=True)
    total = sum(in_order(_file_bytes, files, at=files))
    words = f"{len(chosen)} of {len(files)} files"
    return RowCount(round(rows * total / max(sampled_bytes, 1e-9)), words, is_exact=False)


def _count(reader: SourceReader[Any], file: Place, deadline: float) -> tuple[int, float]:
    """Return the samples of a file up to the deadline, and the share of it that was listed."""
    if (known := reader.num_samples(file)) is not None:
        return known, 1.0
    count, size = 0, _file_bytes(file)
    for count, sample in enumerate(reader.samples(file, Counts()), 1):
        is_placed = 0 < sample.offset < size
        if count >= SAMPLES_AT_LEAST and is_placed and time.monotonic() > deadline:
            return count, (sample.offset + sample.size) / size
    return count, 1.0


def _file_bytes(file: Place) -> float:
    """Return the size of a file, 1 for a folder: those of classes count alike."""
    if isinstance(file, Path) and file.is_dir():
        return 1.0
    return float(next(iter(version(file).values()))[0])


def plan_run(
    config: RunConfig, *, rows: int | None, seconds: float, price: float | None
) -> dict[str, Any]:
    """Return rows, bytes, and hours of both stages, as plain data.

    Args:
        config: The recipe; nothing is downloaded for it, and nothing written but a temporary file.
        rows: Rows of each training split, where they are not to be taken from its source.
        seconds: What measuring may take on this machine, apart from loading encoders.
        price: Euros an hour of a GPU.

    Raises:
        SourceError: The rows of the training split are not known.
    """
    config.check_trains()
    folder = run_folder(config)
    parts = 2 + len(config.encoders.image) + len(config.encoders.text)
    splits, missing = _rows_of_splits(config, folder, rows, seconds / parts)
    every = sum(found.count for found in splits.values())
    with sample_index(config, folder) as index:
        measuring = Measuring(config, index, seconds / parts)
        passes = [
            *(measuring.image(name, every) for name in config.encoders.image),
            *(each for name in config.encoders.text for each in measuring.text(name, every)),
        ]
    size, stage_two = _bytes(config, passes, splits), _stage_two(config, passes, splits)
    return {
        "run": config.run.name,
        "splits": {
            name: {"rows": found.count, "found_in": found.found_in, "exact": found.is_exact}
            for name, found in splits.items()
        },
        "splits_left_out": missing,
        "columns": size,
        "bytes": sum(column["bytes"] or 0 for column in size),
        "free_bytes": _free_bytes(folder.store(config.trained_splits[0])),
        "passes": [_described(each) for each in passes],
        "this_machine": _this_machine(config, passes, seconds),
        "stage_two": stage_two,
        "price": price,
        "gpus": _gpus(passes, stage_two, price),
        "assumed": {
            "encoder_utilisation": ENCODER_UTILISATION,
            "head_utilisation": HEAD_UTILISATION,
            "decoded_per_core": None
            if any(each.decoded_per_core for each in passes)
            else ASSUMED_DECODED_PER_CORE,
        },
    }


def _rows_of_splits(
    config: RunConfig, folder: RunFolder, rows: int | None, seconds: float
) -> tuple[dict[str, RowCount], dict[str, str]]:
    """Return the rows of each split, and why those of others are not known."""
    found, missing = {}, {}
    for split, source in config.data.items():
        is_trained = split in config.trained_splits
        try:
            found[split] = rows_of(
                folder.index(split),
                source,
                given=rows if is_trained else None,
                seconds=seconds / len(config.data),
            )
        except SailError as error:
            if is_trained:
                raise SourceError(
                    f"{error} The rows of {split!r} cannot be counted without it; give them with "
                    f"--rows, such as 23M."
                ) from error
            missing[split] = str(error)
    return found, missing


def _bytes(
    config: RunConfig, passes: list[Pass], splits: dict[str, RowCount]
) -> list[dict[str, Any]]:
    chunk = config.extract.rows_per_chunk
    return [
        {
            "column": name,
            "dim": dim,
            "bytes": None
            if dim is None
            else sum(column_bytes(found.count, dim, chunk) for found in splits.values()),
        }
        for each in passes
        for name, dim in each.dims.items()
    ]


def _free_bytes(store: Place) -> int | None:
    """Return the room where a store will be; None under a URL."""
    return shutil.disk_usage(existing_folder(store)).free if isinstance(store, Path) else None


def _described(made: Pass) -> dict[str, Any]:
    return {
        "pass": made.name,
        "rows": made.rows,
        "flops_per_row": made.flops,
        "flops_from": made.flops_from,
        "tokens": made.tokens,
        "tokens_from": made.tokens_from,
        "rows_per_second": made.per_second,
        "hours": {phase.name: phase.hours for phase in made.phases},
        "total_hours": column_hours(made.phases) if made.phases else None,
        "bottleneck": bottleneck(made.phases),
    }


def _this_machine(config: RunConfig, passes: list[Pass], seconds: float) -> dict[str, Any]:
    device = prepare_device(config.run)
    measured = [each for each in passes if each.phases]
    slowest = max(measured, key=lambda each: column_hours(each.phases), default=None)
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu(device) else str(device),
        "cores": usable_processors(),
        "seconds_given": seconds,
        "measured": [each.name for each in measured],
        "stage_one_hours": sum(column_hours(each.phases) for each in measured)
        if len(measured) == len(passes)
        else None,
        "bottleneck": f"{bottleneck(slowest.phases)} of {slowest.name}" if slowest else None,
    }


def _stage_two(
    config: RunConfig, passes: list[Pass], splits: dict[str, RowCount]
) -> dict[str, Any] | None:
    """Return the work of training the head, None where the encoders' lengths are not known."""
    image, text = config.aligned_encoder("image"), config.aligned_encoder("text")
    dims = {name: dim for each in passes for name, dim in each.dims.items()}
    align = config.align
    first, *_ = texts = text.split(BESIDE)
    fields = [name.split("/")[2] for name in dims if name.startswith(f"text/{first}/")]
    fields = [name for name in fields if not align.fields or name in align.fields]
    needed = [f"image/{name}" for name in image.split(BESIDE)]
    of_texts = [f"text/{name}/{fields[0]}" for name in texts] if fields else []
    image_dims, text_dims = ([dims.get(name) for name in names] for names in (needed, of_texts))
    if not fields or None in image_dims or None in text_dims:
        return None
    image_dim, text_dim = (sum(filter(None, each)) for each in (image_dims, text_dims))
    every = sum(splits[name].count for name in config.trained_splits)
    rows = round(every * (1 - align.holdout))
    rows = max(1, min(rows, align.rows or rows))
    align = settled(align, rows=rows, fits=rows, dims=(image_dim, text_dim))
    captions = min(align.captions_per_image or len(fields), len(fields))
    given = align.steps is not None
    samples = align.batch_size * (align.steps or 0) if given else rows * align.epochs
    flops = training_flops(
        head_flops(image_dim, align.head),
        head_flops(text_dim, align.head),
        fields=captions,
        batch=align.batch_size,
        dim=align.head.dim,
    )
    return {
        "samples": samples,
        "flops_per_sample": flops,
        "bytes_per_epoch": rows * BYTES_PER_VALUE * (image_dim + len(fields) * text_dim),
        "memory": _memory(align, image_dim, text_dim, captions),
    }


def _memory(align: AlignConfig, image_dim: int, text_dim: int, captions: int) -> dict[str, Any]:
    """Return the bytes of a step, and the `micro_batch` with which it fits on each named GPU."""
    if align.precision == "auto":
        align = align.model_copy(update={"precision": "bfloat16"})
    rooms = {name: room_of_step(align, gpu.memory) for name, gpu in GPUS.items()}
    steps: dict[int, StepMemory] = {}
    for size in sizes_at_once(align):
        steps[size] = step_memory(
            align, image_dim=image_dim, text_dim=text_dim, captions=captions, rows_at_once=size
        )
        before, peak = steps.get(2 * size), steps[size].peak
        if peak <= min(rooms.values()) or (before and peak > LITTLE_SAVED * before.peak):
            break
    fits = {
        name: next((size for size, each in steps.items() if each.peak <= room), None)
        for name, room in rooms.items()
    }
    return {
        "batch_size": align.batch_size,
        "steps": [{"micro_batch": size, **asdict(each)} for size, each in steps.items()],
        "micro_batch": fits,
    }


def _gpus(
    passes: list[Pass], stage_two: dict[str, Any] | None, price: float | None
) -> list[dict[str, Any]]:
    """Return the hours of both stages on each named GPU, and what it takes to feed it."""
    known = [each for each in passes if each.flops is not None]
    described = []
    for name, gpu in GPUS.items():
        peak = gpu.peak
        each_hours = {
            each.name: hours(each.rows * (each.flops or 0), ENCODER_UTILISATION * peak)
            for each in known
        }
        one = sum(each_hours.values()) if len(known) == len(passes) else None
        two = None
        if stage_two is not None:
            work = stage_two["samples"] * stage_two["flops_per_sample"]
            two = hours(work, HEAD_UTILISATION * peak)
        total = None if one is None or two is None else one + two
        described.append(
            {
                "gpu": name,
                "peak_flops": peak,
                "micro_batch": stage_two["memory"]["micro_batch"][name] if stage_two else None,
                "hours": each_hours,
                "stage_one_hours": one,
                "stage_two_hours": two,
                "total_hours": total,
                "euros": None if price is None or total is None else price * total,
                "cores_to_decode": _cores_to_decode(known, peak),
            }
        )
    return described


def _cores_to_decode(passes: list[Pass], peak: float) -> int | None:
    """Return how many cores must decode so that the GPU does not wait; None without images."""
    needed = []
    for each in passes:
        if each.name.startswith("image/") and each.flops:
            encoded = ENCODER_UTILISATION * peak / each.flops
            rate = each.decoded_per_core or ASSUMED_DECODED_PER_CORE
            needed.append(-(-encoded // rate))
    return int(max(needed)) if needed else None
