"""The files of chunks, where the operating system reads less at once than it is asked for."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from features.errors import StoreCorruptError
from features.storage import chunks
from features.storage.chunks import CRC_BYTES, read_chunk, read_part, read_pieces, write_chunk

ROWS, DIM, AT_ONCE = 40, 16, 100


class SlowFile(io.FileIO):
    """Reads at most so many bytes at once, as Linux does with 2 GiB."""

    def readinto(self, buffer: Any) -> int:
        return super().readinto(memoryview(buffer)[:AT_ONCE]) or 0


@pytest.fixture(autouse=True)
def slow_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_opened", SlowFile)


@pytest.fixture
def chunk(tmp_path: Path) -> tuple[Path, np.ndarray]:
    values = np.random.default_rng(0).random((ROWS, DIM)).astype(np.float16)
    write_chunk(tmp_path / "0", values, beside=tmp_path / "0")
    return tmp_path / "0", values


def test_a_chunk_is_read_to_its_end(chunk: tuple[Path, np.ndarray]) -> None:
    path, values = chunk
    buffer = np.zeros_like(values)
    read_chunk(path, buffer, verify=True)
    np.testing.assert_array_equal(buffer, values)
    part = np.zeros((20, DIM), dtype=np.float16)
    read_part(path, 7 * values[0].nbytes, part)
    np.testing.assert_array_equal(part, values[7:27])
    for first, piece in read_pieces(path, np.zeros((9, DIM), np.float16), ROWS, verify=True):
        np.testing.assert_array_equal(piece, values[first : first + 9])


def test_a_chunk_that_is_cut_off_is_refused_with_the_bytes_it_has(
    chunk: tuple[Path, np.ndarray],
) -> None:
    path, values = chunk
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(StoreCorruptError, match=f"1000 bytes, not {values.nbytes + CRC_BYTES}"):
        read_chunk(path, np.zeros_like(values), verify=False)
    with pytest.raises(StoreCorruptError, match="cut off"):
        read_part(path, 0, np.zeros_like(values))
    with pytest.raises(StoreCorruptError, match=f"ends within {ROWS} rows"):
        list(read_pieces(path, np.zeros_like(values), ROWS, verify=False))
