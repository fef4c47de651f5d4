"""What is read of a file on a server, in whatever pieces: the bytes of the file."""

import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.storage import requests
from features.storage import requests as ranges
from features.storage.place import RemotePath, as_place
from tests.servers import WebServer

CONTENT = random.Random(0).randbytes(10_000)
within = st.integers(0, len(CONTENT))
RANGES = st.lists(st.tuples(within, within).map(lambda pair: (min(pair), max(pair))), max_size=12)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemotePath]:
    """A file on a web server, read in small pieces."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "file").write_bytes(CONTENT)
    with WebServer(folder) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "BLOCK_BYTES", 700)
        patch.setattr(requests, "GAP_BYTES", 100)
        patch.setattr(requests, "PIECE_BYTES", 900)
        place = as_place(f"http://127.0.0.1:{server.port}/file")
        assert isinstance(place, RemotePath)
        yield place


@given(wanted=RANGES)
def test_ranges_in_any_order_and_overlap_hold_their_bytes(
    file: RemotePath, wanted: list[tuple[int, int]]
) -> None:
    found = requests.read_ranges(file, wanted)
    assert [bytes(part) for part in found] == [CONTENT[start:stop] for start, stop in wanted]


@given(start=within, stop=within)
def test_a_buffer_is_filled_whatever_its_length(file: RemotePath, start: int, stop: int) -> None:
    buffer = bytearray(max(0, stop - start))
    requests.read_into(file, start, buffer)
    assert bytes(buffer) == CONTENT[start : start + len(buffer)]


@given(reads=st.lists(st.tuples(st.integers(0, 11_000), st.integers(0, 3_000)), max_size=8))
def test_blocks_fetched_ahead_hold_the_bytes_at_any_place(
    file: RemotePath, reads: list[tuple[int, int]]
) -> None:
    opened = ranges.open_ranges(file)
    try:
        for offset, size in reads:
            assert opened.pread(size, offset) == CONTENT[offset : offset + size]
    finally:
        opened.close()
