"""What `sail doctor` looks at: is all that a run needs here, and does it work?"""

import io
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from packaging.requirements import Requirement
from PIL import Image

from features.config import ImageEncoderConfig, TextEncoderConfig
from features.device.cuda import gpu_number, has_bfloat16
from features.encoders.backends import backend_of
from features.encoders.trial import try_encoder
from features.errors import SailError
from features.images import decode
from features.store import FeatureStore
from pipeline.planning.passes import existing_folder
from pipeline.run.config import RunConfig
from pipeline.run.cpu import usable_processors
from pipeline.run.device import prepare_device, usable_devices
from pipeline.run.filling import load_encoder
from pipeline.run.folder import run_folder
from pipeline.tables import byte_size

BLOCK = 8 << 20
MEGABYTE = 1e6
PHOTO = (640, 480)
DISTRIBUTION = "sail"
SHOWN = ("torch", "transformers", "zarr", "numpy", "pyarrow", "pillow")
LITTLE_ROOM = 10e9
LITTLE_SHARED_MEMORY = 1e9
FEW_FILES = 1024
SECONDS = 1.0
EXTRAS = {
    "demo": "the bundled text encoder of the demo",
    "timm": "encoders of timm",
    "open_clip": "encoders of open_clip",
    "model2vec": "static embeddings of model2vec",
    "heif": "HEIC, as iPhones write it",
    "gpu": "faiss on the GPU",
    "dev": "tests and checks",
}


def disk_megabytes_per_second(
    folder: Path, *, seconds: float, megabytes: int = 512
) -> tuple[float, float]:
    """Write and read a temporary file in a folder; return both speeds.

    What is written is forced to the disk, and dropped from the page cache before it is read, as far
    as the system does so.

    Args:
        folder: Where; nothing is left there.
        seconds: What writing may take; the file is as long as that allows.
        megabytes: And at most this long.

    Raises:
        OSError: The folder cannot be written.
    """
    block = np.random.default_rng(0).bytes(BLOCK)  # nothing that a file system could compress
    with tempfile.NamedTemporaryFile(prefix=".sail-doctor-", dir=folder, buffering=0) as file:
        written, started = 0, time.perf_counter()
        while written < megabytes * MEGABYTE and time.perf_counter() - started < seconds:
            written += file.write(block)
        os.fsync(file.fileno())
        write_seconds = time.perf_counter() - started
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        buffer, started = bytearray(BLOCK), time.perf_counter()
        while file.readinto(buffer):
            pass
        read_seconds = max(time.perf_counter() - started, 1e-9)
    return written / MEGABYTE / write_seconds, written / MEGABYTE / read_seconds


def decoded_per_second(*, seconds: float) -> float:
    """Return how many JPEGs of 640 × 480 pixels one core decodes and resizes to 224 a second."""
    small = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    photo = io.BytesIO()
    Image.fromarray(small).resize(PHOTO, Image.Resampling.BICUBIC).save(photo, "JPEG", quality=90)
    count, started = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - started < seconds:
        picture = decode(photo.getvalue(), max_pixels=PHOTO[0] * PHOTO[1])
        picture.resize((224, 224), Image.Resampling.BICUBIC)
        count += 1
    return count / (time.perf_counter() - started)


def faiss_finds_neighbours() -> bool:
    """Search a small set of vectors, and return whether the nearest are those worked out here."""
    import faiss

    vectors = np.random.default_rng(0).standard_normal((200, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    _, found = index.search(vectors[:20], 3)
    expected = np.argsort(-(vectors[:20] @ vectors.T), axis=1)[:, :3]
    return bool((found == expected).all())


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: Literal["ok", "note", "warning", "broken"]
    """`note`: is not there, and need not be. `broken`: a run would fail."""
    found: str
    advice: str = ""
    """What to do, in words or as a command."""


def examine(config: RunConfig | None) -> dict[str, Any]:
    """Look at everything, and return it as plain data.

    Args:
        config: A recipe whose encoders, sources and folder are looked at too.
    """
    place = config.run.dir if config else Path("runs")
    checks = [
        *_packages(),
        *_extras(),
        *_devices(config),
        _faiss(),
        *_disk(place),
        _decoding(),
        *_limits(),
        *(_recipe(config) if config else ()),
    ]
    return {
        "ok": all(check.status != "broken" for check in checks),
        "checks": [asdict(check) for check in checks],
    }


def _requirements(extra: str = "") -> list[Requirement]:
    """Return what this program needs, or what an extra adds."""
    listed = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or []]
    return [
        each
        for each in listed
        if (each.marker.evaluate({"extra": extra}) if each.marker else not extra)
        and (not extra or not each.marker or not each.marker.evaluate({"extra": ""}))
    ]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[Check]:
    yield Check("python", "ok", sys.version.split()[0])
    try:
        needed = _requirements()
    except metadata.PackageNotFoundError:
        yield Check("sail", "warning", "is not installed as a package", "pip install -e .")
        return
    yield Check("sail", "ok", metadata.version(DISTRIBUTION))
    for each in needed:
        found = _version(each.name)
        if each.name.startswith("faiss") and found is None:
            continue  # either build will do; it is tried below
        if found is None or not each.specifier.contains(found, prereleases=True):
            what = found or "missing"
            yield Check(each.name, "broken", what, f"pip install '{each.name}{each.specifier}'")
        elif each.name in SHOWN:
            yield Check(each.name, "ok", found)


def _extras() -> Iterator[Check]:
    for extra, what in EXTRAS.items():
        try:
            missing = [each.name for each in _requirements(extra) if _version(each.name) is None]
        except metadata.PackageNotFoundError:
            return
        line = f"pip install -e '.[{extra}]'"
        if extra == "gpu":  # with what it needs, pip would bring faiss-cpu back
            build = next(f"{each.name}{each.specifier}" for each in _requirements(extra))
            line = f"pip uninstall faiss-cpu && pip install --no-deps '{build}'"
        if missing:
            yield Check(f"extra {extra}", "note", f"not there: {', '.join(missing)} ({what})", line)
        else:
            yield Check(f"extra {extra}", "ok", what)


def _devices(config: RunConfig | None) -> Iterator[Check]:
    words = f"{usable_processors()} cores, {torch.get_num_threads()} threads of torch"
    yield Check("processor", "ok", words)
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        bf16 = "bfloat16" if has_bfloat16(gpu_number(number)) else "float16, no bfloat16"
        words = f"{about.name}, {byte_size(about.total_memory)}, {bf16}"
        yield Check(f"cuda:{number}", "ok", words)
    if not torch.cuda.is_available():
        yield Check("GPU", "note", "none that torch can use: encoders run on the processor")
    here, wanted = usable_devices(), config.run.device if config else "auto"
    if wanted not in ("auto", *here):
        advice = "set run.device to auto, or install a driver and a build of torch that has it"
        yield Check("run.device", "broken", f"{wanted}, which is not here", advice)


def _faiss() -> Check:
    """Try the build of faiss that is here: faiss-cpu, faiss-gpu, faiss-gpu-cu12, that of conda."""
    builds = sorted(set(metadata.packages_distributions().get("faiss", [])))
    if not builds and find_spec("faiss") is None:
        return Check("faiss", "broken", "missing: k-NN needs it", "pip install faiss-cpu")
    if len(builds) > 1:
        advice = f"pip uninstall {' '.join(builds)}, then install one of them"
        return Check("faiss", "warning", f"{' and '.join(builds)} overwrite each other", advice)
    build = builds[0] if builds else "faiss"
    fault = ""
    try:
        import faiss

        if not faiss_finds_neighbours():
            fault = "finds the wrong neighbours"
    except (ImportError, RuntimeError, AttributeError) as error:
        fault = f"fails: {error}"
    if fault:
        again = f"pip install --force-reinstall {build}"
        return Check("faiss", "broken", f"{build} {fault}", again)
    kind = "GPU" if hasattr(faiss, "StandardGpuResources") else "CPU"
    words = f"{build} {faiss.__version__}, a {kind} build, finds the right neighbours"
    return Check("faiss", "ok", words)


def _disk(place: Path) -> Iterator[Check]:
    folder = existing_folder(place)
    free = shutil.disk_usage(folder).free
    advice = "" if free > LITTLE_ROOM else "`sail plan` says how much a run needs"
    status: Literal["ok", "warning"] = "warning" if advice else "ok"
    yield Check("free space", status, f"{byte_size(free)} at {folder}", advice)
    try:
        write, read = disk_megabytes_per_second(folder, seconds=SECONDS)
    except OSError as error:
        advice = "set run.dir to a folder that can be written"
        yield Check("disk", "broken", f"{folder}: {error.strerror or error}", advice)
        return
    yield Check("disk", "ok", f"writes {write:,.0f} MB/s, reads {read:,.0f} MB/s at {folder}")


def _decoding() -> Check:
    rate = decoded_per_second(seconds=SECONDS)
    return Check("decoding", "ok", f"{rate:,.0f} JPEGs of 640 × 480 a second on one core")


def _limits() -> Iterator[Check]:
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        advice = "in a container: --shm-size=8g" if free < LITTLE_SHARED_MEMORY else ""
        yield Check("/dev/shm", "warning" if advice else "ok", f"{byte_size(free)} free", advice)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= files < FEW_FILES:
        yield Check("open files", "warning", f"at most {files}", f"ulimit -n {FEW_FILES}")


def _recipe(config: RunConfig) -> Iterator[Check]:
    folder = run_folder(config)
    for split, source in config.data.items():
        try:
            yield Check(f"data.{split}", "ok", source.summary())
        except SailError as error:
            is_done = FeatureStore.is_at(folder.store(split))
            words = f"{error}{' Its feature store is there.' if is_done else ''}"
            yield Check(f"data.{split}", "note" if is_done else "broken", words)
    for kind in ("image", "text"):
        for name, settings in getattr(config.encoders, kind).items():
            yield _encoder(config, f"{kind}/{name}", settings)


def _encoder(
    config: RunConfig, name: str, settings: ImageEncoderConfig | TextEncoderConfig
) -> Check:
    """Try an encoder that is here as a run does before its index."""
    backend = backend_of(settings.model)
    if not backend.is_here(settings.model, settings.revision):
        can_be_fetched, words, advice = backend.missing(settings.model)
        return Check(name, "note" if can_be_fetched else "broken", words, advice)
    try:
        encoder = load_encoder(config, name, prepare_device(config.run))
        try_encoder(encoder)
    except (SailError, torch.OutOfMemoryError) as error:
        return Check(name, "broken", str(error))
    if encoder.plan is None:
        return Check(name, "ok", f"{settings.model} encodes")
    warned = "; ".join(encoder.plan.contradictions)
    words = f"{settings.model} encodes: {encoder.plan.summary()}"
    return Check(name, "warning" if warned else "ok", words, warned)
