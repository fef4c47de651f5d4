"""Files are opened here, by one function for each kind of file.

What a file says of itself (kind, size, nesting, shapes) is checked before it is believed. Libraries
raise anything on damaged bytes; it is taken here, and told as an error that names the file, what is
wrong with it, and what to do.
"""

import errno
import io
import logging
import math
import os
import stat
import tomllib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
from numpy.lib import format as npy
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from features.errors import FileError, SailError, refused
from features.storage import files
from features.storage.place import Place

logger = logging.getLogger(__name__)
MAX_TEXT_BYTES = 1 << 20
"""Of a caption, in UTF-8, whatever kind of file it comes from."""
MAX_LINE = 1 << 24
"""Letters of a line of a table."""
MAX_DOCUMENT_BYTES = 1 << 28
"""Of a file that is read into memory as a whole: JSON, TOML, text."""
MAX_ARCHIVE_BYTES = 1 << 32
MAX_SHOWN = 200
CRC_BYTES = 4
CRC_BLOCK_BYTES = 1 << 24
IN_WORDS = {
    FileNotFoundError: "there is no such file",
    MemoryError: "it asks for more memory than there is",
    RecursionError: "it is nested too deep",
}
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


@dataclass(frozen=True)
class Expected:
    """What a file is taken for, and what to do where it is something else."""

    what: str
    """As in "A JSON object"."""
    remedy: str
    """A sentence: "Delete it and run `sail eval` again."."""
    error: type[SailError] = FileError
    """What is raised."""
    called: str = ""
    """What stands before the name, as in "The templates", where that may be no path."""

    def refusal(self, place: object, why: str) -> SailError:
        """Return the error of a file that cannot be used."""
        subject = f"{self.called} {str(place)!r}" if self.called else place
        return self.error(
            f"{subject} cannot be read: {why}. {self.what} was expected. {self.remedy}"
        )


@contextmanager
def reading(place: object, expected: Expected) -> Iterator[None]:
    """Word whatever a library raises while it reads a file; errors of ours pass.

    To be kept around calls of the library alone: a fault of ours would be blamed on the file.
    """
    try:
        yield
    except (SailError, NameError):  # a NameError is a fault of ours, whatever the file holds
        raise
    except Exception as error:
        logger.debug("%s", place, exc_info=error)
        if isinstance(error, OSError) and error.filename and error.errno != errno.ENOENT:
            raise expected.error(refused(error, "this command")) from error
        raise expected.refusal(place, reason_of(error)) from error


def reason_of(error: BaseException) -> str:
    """Return in some words of one line what a library complains of."""
    if isinstance(error, KeyError):
        return f"it has no {shown(error.args[0] if error.args else '')}"
    for kind, words in IN_WORDS.items():
        if isinstance(error, kind):
            return words
    text = " ".join(str(error).split()).rstrip(".:")
    return cut(text) if text else type(error).__name__


def cut(text: str, most: int = MAX_SHOWN) -> str:
    """Return a text, of a long one the beginning."""
    return text if len(text) <= most else f"{text[:most]}…"


def shown(value: object) -> str:
    """Return a value as a message has it: of a long one the beginning."""
    return cut(repr(value))


def cut_text(text: str) -> str:
    """Return a text of at most `MAX_TEXT_BYTES`, of a longer one the beginning."""
    if len(text) <= MAX_TEXT_BYTES // 4:  # at most 4 bytes a character
        return text
    content = text[:MAX_TEXT_BYTES].encode(errors="replace")
    if len(content) <= MAX_TEXT_BYTES and len(text) <= MAX_TEXT_BYTES:
        return text
    return content[:MAX_TEXT_BYTES].decode(errors="ignore")


def limited_lines(lines: io.TextIOWrapper, place: object) -> Iterator[str]:
    """Yield the lines of a text that is open, none of which may take all memory.

    Raises:
        FileError: One is longer than `MAX_LINE`.
    """
    number = 1
    while line := lines.readline(MAX_LINE):
        if len(line) == MAX_LINE and not line.endswith("\n"):
            raise FileError(
                f"Line {number} of {place} has more than {MAX_LINE >> 20} million letters. Shorter "
                f"ones were expected, with captions of 1 MiB at most. Correct the line."
            )
        yield line
        number += 1


def check_regular(path: Path) -> Path:
    """Refuse what is no file: opening a FIFO would wait for ever, reading a device never end.

    Raises:
        FileNotFoundError: There is nothing.
        ValueError: Saying what it is.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"it is {KINDS.get(stat.S_IFMT(mode), 'something else')}, not a file")
    return path


def read_document(
    place: Place, expected: Expected, *, most_bytes: int = MAX_DOCUMENT_BYTES
) -> bytes:
    """Return the content of a file that fits into memory.

    Raises:
        SailError: It is missing, no file, or larger.
    """
    with reading(place, expected):
        if isinstance(place, Path):
            size = check_regular(place).stat().st_size
            if size > most_bytes:
                raise ValueError(f"it has {size} bytes, more than {most_bytes}")
        return files.read(place)


def read_text(place: Place, expected: Expected) -> str:
    """Return a text file in UTF-8, with or without a byte order mark.

    Raises:
        SailError: It is missing or not UTF-8.
    """
    content = read_document(place, expected)
    with reading(place, expected):
        return content.decode("utf-8-sig")


def read_toml(path: Path, expected: Expected) -> dict[str, Any]:
    """Return what a TOML file says.

    Raises:
        SailError: It is missing, or no TOML.
    """
    text = read_text(path, expected)
    with reading(path, expected):
        return tomllib.loads(text)


def read_json(place: Place, schema: Any, expected: Expected) -> Any:
    """Return what a JSON file says, checked against a type.

    Args:
        place: The file.
        schema: What pydantic can check: `dict[str, Any]`, a dataclass, a model.
        expected: For the message.

    Raises:
        SailError: It is missing, no JSON, nested deeper than 200 levels, or of another form.
    """
    content = read_document(place, expected)
    with reading(place, expected):
        document = from_json(content.removeprefix(b"\xef\xbb\xbf"))
    return checked(document, schema, place, expected)


def checked(document: object, schema: Any, place: object, expected: Expected) -> Any:
    """Return a document as a type.

    Raises:
        SailError: Naming the first part of it that does not fit.
    """
    try:
        return _adapter(schema).validate_python(document)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"])) or "it"
        why = f"{where} is {shown(fault['input'])}: {fault['msg']}"
        raise expected.refusal(place, why) from None


@cache
def _adapter(schema: Any) -> Any:
    return TypeAdapter(schema)


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Read a file of JSON objects, one a line, that another process may be writing.

    Returns:
        The objects, and how many lines are none. A last line that is not finished is not counted.
    """
    lines = read_document(path, Expected("A file of JSON lines", "Delete it.")).split(b"\n")
    found = [_object(line) for line in lines]
    objects = [each for each in found if each is not None]
    return objects, len(lines) - len(objects) - (found[-1] is None)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = from_json(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def read_npz(path: Path, expected: Expected) -> dict[str, np.ndarray]:
    """Return the arrays of a NumPy archive, each whole: the archive has their checksums.

    Raises:
        SailError: It is missing, damaged, or has more than arrays of numbers.
    """
    with reading(path, expected), zipfile.ZipFile(check_regular(path)) as archive:
        members = archive.infolist()
        if (size := sum(each.file_size for each in members)) > MAX_ARCHIVE_BYTES:
            raise ValueError(f"unpacked it has {size} bytes, more than {MAX_ARCHIVE_BYTES}")
        return {each.filename.removesuffix(".npy"): _member(archive, each) for each in members}


def _member(archive: zipfile.ZipFile, about: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(about) as file:
        shape, dtype = npy_header(file, about.file_size)
        return np.frombuffer(bytearray(file.read()), dtype=dtype).reshape(shape)


def npy_header(file: Any, size: int) -> tuple[tuple[int, ...], np.dtype]:
    """Read the header of an array in NumPy's format; the file is left at the first number.

    Args:
        file: Open, at its beginning.
        size: Bytes of the file.

    Returns:
        Shape and type of the values.

    Raises:
        ValueError: It is none, holds Python objects, lies in memory column by column, or the file
            has not as many bytes as that is.
    """
    major, _ = npy.read_magic(file)
    read = npy.read_array_header_1_0 if major == 1 else npy.read_array_header_2_0
    shape, by_columns, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if by_columns and len(shape) > 1:
        raise ValueError("it lies in memory column by column (save `ascontiguousarray`)")
    if min(shape, default=0) < 0:
        raise ValueError(f"it has shape {shape}")
    wanted, found = dtype.itemsize * math.prod(shape), size - file.tell()
    if found < wanted:
        raise ValueError(f"shape {shape} of {dtype} takes {wanted} bytes, and it has {found}")
    return shape, dtype


def seal(path: Path, name: str) -> None:
    """Put a crc32c behind the bytes of a file, for `is_sealed`; readers of arrays ignore it.

    Args:
        path: Where the file is now.
        name: That it will have, which stands for what is in it: the crc32c is of the name, too.
    """
    with path.open("r+b") as file:
        crc = _crc(file, os.fstat(file.fileno()).st_size, name)
        file.write(crc)


def is_sealed(path: Path) -> bool:
    """Return whether a file that is kept for later calls is there, as `seal` left it.

    Another sealed file in its place is not.
    """
    expected = Expected("A file with its crc32c", "It is made again.")
    if not path.exists():
        return False
    try:
        with reading(path, expected), check_regular(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size - CRC_BYTES
            if size < 0 or _crc(file, size, path.name) != file.read():
                raise ValueError("its crc32c does not match its name and bytes")
    except SailError as error:
        logger.warning("%s", error)
        return False
    return True


def _crc(file: BinaryIO, size: int, name: str) -> bytes:
    """Return the crc32c of a name and the next bytes of a file."""
    crc: int = google_crc32c.value(name.encode())
    buffer = np.empty(min(size, CRC_BLOCK_BYTES), dtype=np.uint8)
    while size > 0 and (count := file.readinto(buffer[:size])):  # type: ignore[attr-defined]
        crc = google_crc32c.extend(crc, buffer[:count])
        size -= count
    return crc.to_bytes(CRC_BYTES, "little")


def read_kept(path: Path, shape: tuple[int, ...], dtype: str = "<f2") -> np.ndarray | None:
    """Map a sealed `.npy` file; None where it is missing, damaged, or of another shape or dtype.

    The name of such a file stands for what is in it.
    """
    if not is_sealed(path):
        return None
    with path.open("rb") as file:
        found, its_dtype = npy_header(file, os.fstat(file.fileno()).st_size - CRC_BYTES)
        start = file.tell()
    if found != shape or its_dtype != np.dtype(dtype):
        logger.warning("%s has shape %s of %s. It is made again.", path, found, its_dtype)
        return None
    if not math.prod(shape):
        return np.empty(shape, dtype=dtype)
    return np.memmap(path, dtype, "r", start, shape)


def read_safetensors(path: Path, expected: Expected) -> dict[str, Any]:
    """Return the tensors of a safetensors file, in memory.

    Raises:
        SailError: It is missing or damaged.
    """
    from safetensors.torch import load_file  # torch comes with it

    with reading(path, expected):
        return dict(load_file(check_regular(path)))


def read_torch(path: Path, expected: Expected, *, mapped: bool = False) -> Any:
    """Return what a PyTorch file holds: tensors and plain values, nothing that could run.

    Raises:
        SailError: It is missing, damaged, packed, or has tensors that are larger than the file.
    """
    import torch

    with reading(path, expected):
        size = check_regular(path).stat().st_size
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(each.compress_type != zipfile.ZIP_STORED for each in archive.infolist()):
                    raise ValueError("its tensors are packed")
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        for tensor in _tensors(loaded):
            there = min(size, tensor.untyped_storage().nbytes())
            if tensor.nelement() * tensor.element_size() > there:
                raise ValueError(
                    f"a tensor of shape {tuple(tensor.shape)} has only {there} bytes in the file"
                )
        return loaded


def _tensors(value: Any) -> Iterator[Any]:
    if hasattr(value, "element_size"):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for each in value:
            yield from _tensors(each)
