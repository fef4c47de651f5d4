"""Files that are not what they seem: each is told in one line, soon, and without taking memory."""

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib import format as npy

from features.errors import FileError
from features.storage import files
from features.storage.reading import (
    MAX_TEXT_BYTES,
    Expected,
    check_regular,
    cut_text,
    is_sealed,
    read_json,
    read_json_lines,
    read_kept,
    read_npz,
    read_safetensors,
    read_text,
    read_toml,
    read_torch,
    reading,
    seal,
)

EXPECTED = Expected("A whole file", "Fetch it again.")
READERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: read_text(path, EXPECTED),
    "toml": lambda path: read_toml(path, EXPECTED),
    "json": lambda path: read_json(path, dict[str, int], EXPECTED),
    "npz": lambda path: read_npz(path, EXPECTED),
    "safetensors": lambda path: read_safetensors(path, EXPECTED),
    "torch": lambda path: read_torch(path, EXPECTED),
}


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "nothing", "loop"])
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_refused_by_name_and_keeps_nobody_waiting(
    name: str, kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "odd"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "nothing":
        path.symlink_to("/dev/zero" if kind == "device" else "odd")
    with pytest.raises(FileError, match="odd") as caught:
        READERS[name](path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 10_000,
        b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16,
        b"PK\x03\x04" + bytes(40),
        b"\x80\x02]q\x00.",
        (1 << 40).to_bytes(8, "little") + b"{}",
        json.dumps({"a": "x"}).encode(),
    ],
    ids=lambda content: repr(content[:8]),
)
@pytest.mark.parametrize("name", READERS)
def test_damaged_bytes_are_told_in_one_line(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    path.write_bytes(content)
    told = ""
    try:
        READERS[name](path)
    except FileError as error:
        told = str(error)
    assert str(path) in told or name in ("text", "toml", "torch")  # of some kinds a few are whole
    assert "\n" not in told
    assert len(told) < 1000


def test_json_is_checked_against_its_type_and_the_part_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\ufeff{"a": 1}')
    assert read_json(path, dict[str, int], EXPECTED) == {"a": 1}
    path.write_text('{"a": [1, 2]}')
    with pytest.raises(FileError, match=r"a\.json cannot be read: a is \[1, 2\]: .*Fetch it again"):
        read_json(path, dict[str, int], EXPECTED)


def test_lines_that_are_damaged_are_counted_but_for_one_that_is_being_written(
    tmp_path: Path,
) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b'{"a": 1}\n\xff\n[]\n{"b": 2}\n{"c": ')
    assert read_json_lines(path) == ([{"a": 1}, {"b": 2}], 2)


def array(shape: tuple[int, ...], content: bytes) -> bytes:
    buffer = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + content


@pytest.mark.parametrize("shape", [(1 << 40,), (3, 1 << 38), (-1,)])
def test_an_archive_whose_array_declares_more_than_there_is_is_refused(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", array(shape, bytes(12)))
    with pytest.raises(FileError, match=r"a\.npz cannot be read: .*shape"):
        read_npz(path, EXPECTED)


def test_a_flipped_bit_of_an_archive_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=np.arange(1000))
    content = bytearray(path.read_bytes())
    content[4000] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileError, match="CRC"):
        read_npz(path, EXPECTED)


def kept(path: Path) -> np.ndarray:
    values = np.arange(12, dtype=np.float16).reshape(3, 4)
    np.save(path, values)
    seal(path, path.name)
    return values


def test_what_is_kept_is_taken_up_and_numpy_reads_it_too(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    values = kept(path)
    for found in (read_kept(path, (3, 4)), np.load(path)):
        assert found is not None
        np.testing.assert_array_equal(found, values)
    assert read_kept(path, (4, 3)) is None
    assert read_kept(tmp_path / "none.npy", (3, 4)) is None


def test_any_damage_of_what_is_kept_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    kept(path)
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        assert not is_sealed(path), place
        path.write_bytes(content[:place])
        assert not is_sealed(path), place
    path.write_bytes(content)
    assert is_sealed(path)
    assert not is_sealed(path.rename(tmp_path / "b.npy"))
    os.mkfifo(path)
    assert not is_sealed(path)


def test_a_tensor_that_is_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"x": [torch.zeros(1).expand(1 << 37)]}, path)
    with pytest.raises(FileError, match=r"shape \(137438953472,\) has only 4 bytes"):
        read_torch(path, EXPECTED)
    torch.save(torch.arange(5), path)
    assert read_torch(path, EXPECTED).tolist() == [0, 1, 2, 3, 4]


def test_tensors_that_are_packed_are_refused(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.pt", tmp_path / "a.pt"
    torch.save(torch.zeros(1 << 20), whole)
    with (
        zipfile.ZipFile(whole) as there,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in there.namelist():
            packed.writestr(name, there.read(name))
    with pytest.raises(FileError, match="its tensors are packed"):
        read_torch(path, EXPECTED)


@pytest.mark.parametrize(
    "text", ["a" * (MAX_TEXT_BYTES + 5), "鳥" * MAX_TEXT_BYTES, "🟥é" * 300_000]
)
def test_a_text_is_cut_at_the_limit_between_characters(text: str) -> None:
    short = cut_text(text)
    assert text.startswith(short)
    assert MAX_TEXT_BYTES - 4 < len(short.encode()) <= MAX_TEXT_BYTES
    assert cut_text(short) == short


def test_a_fifo_in_the_place_of_data_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "data")
    for read in (files.read, files.open_file, check_regular):
        with pytest.raises((OSError, ValueError), match="FIFO"):
            read(tmp_path / "data")


def test_a_reader_takes_any_json_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": {"b": [1, "x"]}}')
    assert read_json(path, dict[str, Any], EXPECTED) == {"a": {"b": [1, "x"]}}


def test_a_fault_of_the_program_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    with pytest.raises(NameError), reading(tmp_path, EXPECTED):
        raise NameError("name 'rows' is not defined")
