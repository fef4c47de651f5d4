"""What is left when shards are damaged, files change, or indexing stops half way."""

import gzip
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.errors import SailError, SourceError
from features.index import Index, SampleReader, build_index, find_changes, update_index
from features.sources.class_folders import ClassFolderSource
from features.sources.folder import FolderSource
from features.sources.parquet import ParquetSource
from features.sources.webdataset import NO_END, WebdatasetSource
from tests import tiny


class Killed(BaseException):
    """Stands for SIGKILL: no `except Exception` may catch it."""


def shard(path: Path, count: int = 5) -> WebdatasetSource:
    tiny.write_tar(path / "s.tar", tiny.samples(count))
    return WebdatasetSource(kind="webdataset", path=str(path / "s.tar"))


def test_a_tar_cut_off_says_where_and_how_many_samples_were_whole(tmp_path: Path) -> None:
    source = shard(tmp_path)
    tar = tmp_path / "s.tar"
    tar.write_bytes(tar.read_bytes()[:6000])
    with pytest.raises(SourceError, match=r"byte 6000 \(whole samples before it: 1\)"):
        build_index(source.open(), tmp_path / "index.parquet")
    assert list(tmp_path.iterdir()) == [tar]


def test_a_tar_that_ends_between_two_members_is_read_and_counted(tmp_path: Path) -> None:
    source = shard(tmp_path)
    tar = tmp_path / "s.tar"
    tar.write_bytes(tar.read_bytes().rstrip(b"\0") + bytes(512 - len(tar.read_bytes()) % 512))
    content = tar.read_bytes()
    tar.write_bytes(content[: len(content) // 512 * 512])
    index = build_index(source.open(), tmp_path / "index.parquet")
    assert index.rows == 5
    assert index.counts[NO_END] == 1


def test_a_damaged_header_is_refused_with_its_place(tmp_path: Path) -> None:
    source = shard(tmp_path)
    tar = tmp_path / "s.tar"
    content = bytearray(tar.read_bytes())
    content[content.index(b"00003.json")] ^= 1
    tar.write_bytes(content)
    with pytest.raises(SourceError, match=r"damaged at byte \d+ \(whole .* it: 3\)"):
        build_index(source.open(), tmp_path / "index.parquet")


def test_a_compressed_tar_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(b"\x1f\x8b\x08" + bytes(2000))
    source = WebdatasetSource(kind="webdataset", path=str(tmp_path / "s.tar"))
    with pytest.raises(SourceError, match=r"compressed with gzip.*Unpack a compressed one once"):
        build_index(source.open(), tmp_path / "index.parquet")


def test_an_index_that_was_not_finished_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shard(tmp_path)
    build_index(source.open(), tmp_path / "index.parquet")
    before = (tmp_path / "index.parquet").read_bytes()

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "add_key_value_metadata", die)
        with pytest.raises(Killed):
            build_index(source.open(), tmp_path / "index.parquet")
    assert (tmp_path / "index.parquet").read_bytes() == before
    assert build_index(source.open(), tmp_path / "index.parquet").rows == 5


@pytest.mark.parametrize("part", [0, 100, 0.5])
def test_a_damaged_index_is_refused_by_name(tmp_path: Path, part: float) -> None:
    path = build_index(shard(tmp_path).open(), tmp_path / "index.parquet").path
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content)) if part < 1 else int(part)])
    with pytest.raises(SourceError, match=r"index\.parquet cannot be read"):
        Index.open(path)


def test_a_parquet_file_of_someone_else_is_no_index(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(SourceError, match=r"other\.parquet cannot be read"):
        Index.open(tmp_path / "other.parquet")


def test_a_shard_cut_off_after_indexing_is_named(tmp_path: Path) -> None:
    reader = SampleReader(build_index(shard(tmp_path).open(), tmp_path / "index.parquet"))
    tar = tmp_path / "s.tar"
    tar.write_bytes(tar.read_bytes()[:2000])
    with pytest.raises(SourceError, match=r"s\.tar ends at byte \d+, within an image"):
        reader.read(0, 5)
    tar.unlink()
    with pytest.raises(SourceError, match=r"s\.tar cannot be opened \(No such file"):
        reader.read(0, 5)


def test_an_image_file_that_grew_after_indexing_is_named(tmp_path: Path) -> None:
    image = tmp_path / "images" / "a" / "1.jpg"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"image")
    source = ClassFolderSource(kind="classes", path=tmp_path / "images")
    reader = SampleReader(build_index(source.open(), tmp_path / "index.parquet"))
    image.write_bytes(b"image and more")
    with pytest.raises(SourceError, match=r"1\.jpg has 14 bytes and had 5"):
        reader.read_row(0)


def test_a_parquet_file_that_lost_rows_after_indexing_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"image": [b"1", b"2"]}), path)
    source = ParquetSource(kind="parquet", path=str(path))
    reader = SampleReader(build_index(source.open(), tmp_path / "index.parquet"))
    pq.write_table(pa.table({"image": [b"1"]}), path)
    with pytest.raises(SourceError, match=r"p\.parquet cannot be read as it was indexed.*1 rows"):
        reader.read(0, 2)


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(SourceError, match=r"p\.parquet cannot be read as parquet"):
        build_index(
            ParquetSource(kind="parquet", path=str(tmp_path / "*.parquet")).open(),
            tmp_path / "i.parquet",
        )


@pytest.mark.parametrize("compression", ["zstd", "snappy", "gzip"])
def test_a_parquet_file_damaged_within_its_images_is_named(
    compression: str, tmp_path: Path
) -> None:
    path = tmp_path / "p.parquet"
    table = pa.table({"image": [bytes([row]) * 5_000 for row in range(9)], "caption": ["a"] * 9})
    pq.write_table(table, path, compression=compression, use_dictionary=False)
    chunk = pq.read_metadata(path).row_group(0).column(0)
    content = bytearray(path.read_bytes())
    middle = chunk.data_page_offset + chunk.total_compressed_size // 2
    content[middle : middle + 16] = bytes(byte ^ 0xFF for byte in content[middle : middle + 16])
    path.write_bytes(content)
    source = ParquetSource(kind="parquet", path=str(path))
    reader = SampleReader(build_index(source.open(), tmp_path / "index.parquet"))
    with pytest.raises(SourceError, match=r"p\.parquet cannot be read as it was indexed"):
        reader.read(0, 9)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("t.jsonl", b'{"image": "1.jpg"}\n{"image"', "Line 2 of .* is not a JSON object"),
        ("t.jsonl", b"\xff\xfa", "cannot be read: 'utf-8' codec"),
        ("t.csv", b'image\n"' + b"x" * (1 << 24) + b"xx", "Line 1 of .* more than 16 million"),
        ("t.parquet", b"PAR1", r"t\.parquet cannot be read"),
        ("t.xlsx", b"PK", r"ends in '\.xlsx'\. One of \.jsonl, .*, \.parquet was"),
    ],
)
def test_a_damaged_table_is_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SailError, match=reason):
        build_index(
            FolderSource(kind="folder", path=tmp_path / name).open(), tmp_path / "index.parquet"
        )


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "zeros": lambda _: bytes(2 << 20),
    "a page": lambda _: b"<html>no such file</html>" * 50,
    "compressed": lambda content: gzip.compress(content),
    "cut off": lambda content: content[:6000],
    "damaged": lambda content: content.replace(b"00003.json", b"00003.jsoN"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_shard_is_left_out_as_a_whole_and_named(tmp_path: Path, damage: str) -> None:
    samples = tiny.samples(5)
    for name in ("a", "b", "c"):
        tiny.write_tar(tmp_path / f"{name}.tar", samples)
    whole = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(DAMAGES[damage](whole))
    source = WebdatasetSource(kind="webdataset", path=str(tmp_path / "*.tar"))
    index = build_index(source.open(), tmp_path / "index.parquet")
    assert [path.name for path in index.shards] == ["a.tar", "c.tar"]
    assert [path.name for path in index.unreadable] == ["b.tar"]
    assert index.rows == 10
    assert not any("b/" in key for block in index.blocks(("key",), 100) for key in block["key"])
    assert not find_changes(index, source.open(index.names))  # a finished run stays one

    (tmp_path / "b.tar").write_bytes(whole)
    reader = source.open(index.names)
    changes = find_changes(index, reader)
    assert [path.name for path in changes.files] == ["b.tar"]
    grown = update_index(index, reader, changes, append=True)
    assert (grown.rows, grown.unreadable) == (15, {})


def test_shards_of_which_none_can_be_read_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.tar").write_bytes(b"")
    source = WebdatasetSource(kind="webdataset", path=str(tmp_path / "*.tar"))
    with pytest.raises(SourceError, match=r"b\.tar cannot be read as a tar: it is empty"):
        build_index(source.open(), tmp_path / "out" / "index.parquet")
    assert not (tmp_path / "out").exists()


def test_a_bad_parquet_file_is_left_out_and_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pq.write_table(pa.table({"image": [b"1"]}), tmp_path / f"{name}.parquet")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    source = ParquetSource(kind="parquet", path=str(tmp_path / "[ab].parquet"))
    index = build_index(source.open(), tmp_path / "index.parquet")
    assert ([path.name for path in index.unreadable], index.rows) == (["a.parquet"], 1)
