"""Writes again what `sail verify` finds wrong in a store of a run (`sail repair`)."""

import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from features.errors import SailError, StoreCorruptError, StoreError
from features.index import Index
from features.storage.column import Column, encoder_of
from features.storage.files import delete, folder_beside, move
from features.storage.identity import Identity
from features.storage.manifest import FILE, METADATA, Manifest, read_metadata
from features.storage.place import Place
from features.storage.rows import check_file
from features.store import FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.run.config import SETTINGS_FILE, RunConfig, load_config
from pipeline.run.finished import check_columns
from pipeline.run.folder import RunFolder, filling
from pipeline.run.rows import current_index
from pipeline.stores.verify import Fault, find_faults

logger = logging.getLogger(__name__)
ROUNDS = 3
"""A store whose metadata are damaged shows its other faults only when they are mended."""


@dataclass
class Repair:
    """What was done to a store."""

    encoded: dict[str, list[int]] = field(default_factory=dict)
    """Chunks that were encoded again, by column."""
    written: list[str] = field(default_factory=list)
    """Files of rows and metadata that were written again."""
    left: list[Fault] = field(default_factory=list)
    """What is still wrong."""


def repair_store(path: Place, stop: StopRequest, *, run: str | None = None) -> Repair:
    """Write again the files of a store that are missing or damaged, and no others.

    Chunks of features are encoded again from the sources of the run. Keys, captions, labels and
    metadata come from its index; they are taken only if they are what the manifest says.

    Args:
        path: The store.
        stop: Whether a signal came.
        run: The run file or folder of the run that made it; the folder that the store lies in if
            not given.

    Raises:
        StoreError: The store is of no run, or under a URL without `run`.
        LockedError: Another command fills the columns of the run.
        SourceError: The sources of the run changed.
        Stopped: A signal came; what was repaired is on disk.
    """
    repair, faults = Repair(), find_faults(path)
    if not faults:
        return repair
    config, folder, split = _run_of(path, run)
    with filling(folder.path, shared=False):
        index = current_index(folder, split, config.data[split], stop)
        _repair(repair, faults, path, index, config, stop)
    return repair


def _repair(
    repair: Repair,
    faults: list[Fault],
    path: Place,
    index: Index,
    config: RunConfig,
    stop: StopRequest,
) -> None:
    for _ in range(ROUNDS):
        written = _write_rows(path, index, config, faults) if isinstance(path, Path) else []
        repair.written += written
        if not written:
            break
        faults = find_faults(path)
    if chunks := _chunks(faults):
        before = _encode(path, index, config, chunks, stop)
        repair.encoded = {name: sorted(numbers) for name, numbers in chunks.items()}
        faults = [*find_faults(path), *_others_than_before(FeatureStore.open(path), before)]
    repair.left = faults


def _run_of(path: Place, run: str | None) -> tuple[RunConfig, RunFolder, str]:
    """Return the settings and the folder of the run that a store is of, and its split."""
    if run is None and not isinstance(path, Path):
        raise StoreError(f"{path} is under a URL. Name the run that made it: --run RUN.")
    settings = Path(run) if run is not None else Path(str(path)).absolute().parents[1]
    folder = settings if settings.is_dir() else None
    if folder is not None:
        extracted = folder / "features" / SETTINGS_FILE
        settings = extracted if extracted.is_file() else folder / SETTINGS_FILE
    if run is None and not settings.is_file():
        raise StoreError(
            f"{path} does not lie in the folder of a run: there is no {settings}. Name the run "
            f"that made it (--run RUN), or make it again by the command that it comes from."
        )
    config = load_config(str(settings))
    if path.stem not in config.data:
        raise StoreError(
            f"{settings} has no split {path.stem!r}; it has {list(config.data)}. Name the run that "
            f"made the store: --run RUN."
        )
    if folder is None:
        folder = settings.parent if settings.name == SETTINGS_FILE else config.run.dir
    return config, RunFolder(folder, None, config.extract.store), path.stem


def _chunks(faults: list[Fault]) -> dict[str, set[int]]:
    chunks: dict[str, set[int]] = defaultdict(set)
    for fault in faults:
        if fault.column is not None and fault.chunk is not None:
            chunks[fault.column].add(fault.chunk)
    return dict(chunks)


def _encode(
    path: Place,
    index: Index,
    config: RunConfig,
    chunks: dict[str, set[int]],
    stop: StopRequest,
) -> dict[tuple[str, int], Identity]:
    """Encode chunks again; return the record that each had, where that is known."""
    # torch loads here: a whole store does without
    from pipeline.run.filling import LoadedEncoders, fill_encoder

    store, encoders = FeatureStore.open(path), LoadedEncoders(config)
    names = list(dict.fromkeys(_encoder_with(config, name) for name in chunks))
    for encoder in reversed(names):  # before anything is removed; the last one stays loaded
        check_columns(store, encoders.get(encoder).fingerprints)
    before = {}
    for name, numbers in chunks.items():
        column = store.column(name)
        for chunk in numbers:
            if (record := _recorded(column, chunk)) is not None:
                before[name, chunk] = record
            files = [column.status_file, column.features_file, column.scale_file]
            if column.identities is not None:
                files.append(column.identities.file)
            for file in files:
                _remove(file(chunk))
    for encoder in names:
        fill_encoder(config, encoders, [(store, index)], encoder, stop)
    return before


def _encoder_with(config: RunConfig, column: str) -> str:
    """Return the encoder of the recipe whose pass fills a column."""
    name = encoder_of(column)
    kind, encoder = name.split("/")
    encoders = config.encoders.image if kind == "image" else config.encoders.text
    for each, settings in encoders.items():
        if encoder == each or encoder in settings.also:
            return f"{kind}/{each}"
    raise StoreError(
        f"The run has no encoder {name!r}, so {column} cannot be encoded again. Add it to the "
        f"recipe, and name that: --run RUN."
    )


def _recorded(column: Column, chunk: int) -> Identity | None:
    if column.identities is None:
        return None
    try:
        return column.identities.of(chunk)
    except StoreCorruptError:
        return None


def _others_than_before(
    store: FeatureStore, before: dict[tuple[str, int], Identity]
) -> Iterator[Fault]:
    for (name, chunk), then in before.items():
        column = store.column(name)
        now = _recorded(column, chunk)
        if now is None or now.features == then.features:
            continue
        reason = "the device, or the version of a library, is another than that of the other chunks"
        if 0 not in (now.images, then.images) and now.images != then.images:
            reason = "its images are other bytes than they were, at the same size and time"
        what = f"it was encoded again to other values (crc32c {now.features:08x}, was "
        what += f"{then.features:08x}): {reason}"
        place = str(column.features_file(chunk))
        yield Fault(place, what, "Extract the column again if that matters.")


def _remove(place: Place) -> None:
    if isinstance(place, Path) and place.is_dir() and not place.is_symlink():
        return  # what a user put there is left, and named
    delete(place)


def _write_rows(path: Path, index: Index, config: RunConfig, faults: list[Fault]) -> list[str]:
    """Put files of rows and metadata back that are what the manifest says; return which."""
    wrong = {fault.place for fault in faults if fault.chunk is None}
    with folder_beside(path.parent) as temporary:
        made = FeatureStore.create(
            temporary / path.name, index, rows_per_chunk=_rows_per_chunk(path, config)
        )
        for encoder, about in _encoders(path).items():
            made.add_encoder(encoder, about, dim=int(about["dim"]))
        done = []
        for file in sorted(Path(str(made.path)).rglob("*")):
            name = file.relative_to(Path(str(made.path))).as_posix()
            if file.is_file() and str(path / name) in wrong and _fits(path, made, name, file):
                _remove(path / name)
                move(file, path / name)
                done.append(str(path / name))
    return done


def _rows_per_chunk(path: Path, config: RunConfig) -> int:
    for place in (path / METADATA, path / "key" / METADATA):
        try:
            about = read_metadata(place)
        except StoreCorruptError:
            continue
        found = (
            about["attributes"].get("rows_per_chunk")
            or about.get("chunk_grid", {}).get("configuration", {}).get("chunk_shape", [None])[0]
        )
        if isinstance(found, int):
            return found
    return config.extract.rows_per_chunk


def _encoders(path: Path) -> dict[str, dict[str, Any]]:
    """Return the metadata of the encoders of a store, or those of the other splits of its run."""
    found: dict[str, dict[str, Any]] = {}
    for store in [path, *sorted(path.parent.glob("*.zarr"))]:
        for file in [*store.glob("image/*/zarr.json"), *store.glob("text/*/zarr.json")]:
            try:
                about = read_metadata(file, "group")["attributes"]
            except StoreCorruptError:
                continue
            if isinstance(about.get("dim"), int):
                found.setdefault(file.parent.relative_to(store).as_posix(), about)
    return found


def _fits(path: Path, made: FeatureStore, name: str, file: Path) -> bool:
    """Return whether a file that was made anew is the one that a store is to have."""
    part = name.removesuffix(FILE).rstrip("/") if name.endswith(FILE) else None
    try:
        if part is not None:  # a manifest: it must speak of the metadata that are there
            manifest = Manifest.open(Path(str(made.path)), part)
            return manifest is not None and _speaks_of(manifest, path)
        manifest = Manifest.open(path, _column_of(path, name))
        if manifest is None:
            return False
        if name.endswith(METADATA):
            manifest.check(name.removesuffix(METADATA).rstrip("/"), read_metadata(file))
        else:
            array, _, chunk = name.rpartition("/c/")
            check_file(file, file.read_bytes(), manifest.files(array, int(chunk)))
    except (SailError, ValueError):
        return False
    return True


def _speaks_of(manifest: Manifest, path: Path) -> bool:
    """Return whether each of the metadata that are there is the one that a manifest speaks of."""
    fitting = []
    for name in manifest.contents["metadata"]:
        try:
            about = read_metadata(path / name)
        except StoreCorruptError:
            continue
        try:
            manifest.check(name.removesuffix(METADATA).rstrip("/"), about)
        except StoreCorruptError:
            return False
        fitting.append(name)
    return bool(fitting)


def _column_of(path: Path, name: str) -> str:
    """Return the column whose manifest speaks of a file, "" for that of the store."""
    parts = name.split("/")
    if parts[0] == "text" and len(parts) == 3:  # of an encoder: each of its fields speaks of it
        fields = sorted(path.glob(f"text/{parts[1]}/*/{FILE}"))
        return fields[0].parents[1].relative_to(path).as_posix() if fields else ""
    depth = {"image": 2, "text": 3}.get(parts[0], 0)
    return "/".join(parts[:depth]) if len(parts) > depth else ""
