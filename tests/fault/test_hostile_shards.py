"""Shards made to do harm: nothing is run or written elsewhere, and memory is bounded."""

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.errors import EncoderError, SailError
from features.index import build_index
from features.sources.folder import FolderSource
from features.status import Status
from features.store import FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.run.config import load_config
from pipeline.run.extract import extract
from pipeline.stores.verify import verify_store
from tests import tiny
from tests.peak_memory import peak_bytes_of

ROOT = Path(__file__).resolve().parents[2]
GIGABYTE = 1 << 30
JPEG = tiny.encoded(tiny.picture(0))
JSON = b'{"short": "a circle", "long": "a red circle"}'


def extracted(run_file: Path) -> FeatureStore:
    """Run stage one and open the training store, which must be whole."""
    store = FeatureStore.open(extract(load_config(str(run_file)), StopRequest())[0])
    assert verify_store(store.path) == []
    return store


def statuses(store: FeatureStore, column: str) -> dict[str, Status]:
    """Return what became of each row of the hostile shard, by name."""
    codes = map(Status, store.column(column).status().tolist())
    rows = zip(store.keys().tolist(), codes, strict=True)
    return {key.partition("/")[2]: code for key, code in rows if key.startswith("train-1/")}


def files_outside(folder: Path) -> set[str]:
    """Return all paths below a folder, but not those of the run."""
    paths = (path.relative_to(folder) for path in folder.rglob("*"))
    return {path.as_posix() for path in paths if path.parts[0] != "run"}


def test_members_that_lead_out_of_the_archive_make_no_row_and_no_file(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path, rows=4)
    names = ["../up", "/absolute", "a/../../up", "./../up", "a/..", "inside", "a/b/inside"]
    members = [
        (f"{name}{end}", data) for name in names for end, data in [(".jpg", JPEG), (".json", JSON)]
    ]
    tiny.write_tar(tmp_path / "shards" / "train-1.tar", members)
    before = files_outside(tmp_path)
    store = extracted(run_file)
    assert statuses(store, "image/vit") == {"inside": Status.OK, "a/b/inside": Status.OK}
    assert files_outside(tmp_path) == before


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE],
    ids=["symbolic link", "hard link", "character device", "block device", "pipe"],
)
def test_links_and_devices_are_never_followed(kind: bytes, tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path, rows=4)
    with tarfile.open(tmp_path / "shards" / "train-1.tar", "w") as tar:
        for name, content in [("good.jpg", JPEG), ("good.json", JSON), ("x.json", JSON)]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, target in [
            ("x.jpg", "good.jpg"),
            ("y.jpg", str(run_file)),
            ("y.txt", "/etc/passwd"),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    store = extracted(run_file)
    found = statuses(store, "image/vit")
    assert found == {"good": Status.OK, "x": Status.MISSING_IMAGE}


def pickle_that_makes(folder: Path) -> bytes:
    """A pickle that makes a folder when it is loaded."""

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(folder),)

    return pickle.dumps(Trap())


def test_pickles_in_shards_and_encoders_are_never_loaded(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    content = pickle_that_makes(trap)
    pickle.loads(content)  # noqa: S301 - our own, to see that it would work
    trap.rmdir()

    run_file = tiny.world(tmp_path, rows=4)
    suffixes = ["pkl", "pickle", "pyd", "pth", "pt", "npy", "npz", "jpg", "json", "txt", "cls"]
    members = [(f"x.{suffix}", content) for suffix in suffixes]
    tiny.write_tar(tmp_path / "shards" / "train-1.tar", members)
    store = extracted(run_file)
    assert statuses(store, "image/vit") == {"x": Status.NOT_AN_IMAGE}
    assert not trap.exists()

    (tmp_path / "vit" / "model.safetensors").unlink()
    (tmp_path / "vit" / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(EncoderError, match=r"no \.safetensors"):
        extracted(run_file)
    assert not trap.exists()


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of one black pixel row that says it has another size, and further chunks."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(bytes(2))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in body
    )


def write_sparse_tar(path: Path, members: Sequence[tuple[str, bytes | int]]) -> None:
    """Write a tar in which a member given by its size alone is a hole in the file."""
    with path.open("wb") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = content if isinstance(content, int) else len(content)
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            if isinstance(content, bytes):
                file.write(content)
            padded = -(-info.size // 512) * 512
            file.seek(padded - (len(content) if isinstance(content, bytes) else 0), os.SEEK_CUR)
        file.write(bytes(1024))


def bombs() -> list[tuple[str, bytes | int]]:
    """Members that say they are, or become when unpacked, much more than they are."""
    zeros = zlib.compress(bytes(1 << 27), 9)
    return [
        ("pixels.png", png(60_000, 60_000)),
        ("text.png", png(8, 1, (b"zTXt", b"k\0\0" + zeros))),
        ("profile.png", png(8, 1, (b"iCCP", b"k\0\0" + zeros))),
        ("packed.jpg", gzip.compress(JPEG)),
        ("unread.json.gz", gzip.compress(bytes(1 << 27))),
        ("good.jpg", JPEG),
        ("giant.jpg", 3 * GIGABYTE),
        ("words.jpg", JPEG),
        ("words.json", 3 * GIGABYTE),
        ("deep.jpg", JPEG),
        ("deep.json", b"[" * 1_000_000),
        ("digits.jpg", JPEG),
        ("digits.json", b'{"short": "a", "label": ' + b"9" * 1_000_000 + b"}"),
    ]


@pytest.mark.slow
def test_bombs_are_quarantined_in_bounded_memory(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path, rows=4)
    write_sparse_tar(tmp_path / "shards" / "train-1.tar", bombs())
    peak, errors = peak_bytes_of(["-m", "pipeline.cli", "extract", str(run_file)], cwd=ROOT)
    assert peak < GIGABYTE  # 0.55 GB without the bombs

    found = statuses(extracted(run_file), "image/vit")
    assert found == {
        "pixels": Status.IMAGE_TOO_LARGE,
        "text": Status.TRUNCATED_IMAGE,
        "profile": Status.TRUNCATED_IMAGE,
        "packed": Status.NOT_AN_IMAGE,
        "good": Status.OK,
        "giant": Status.IMAGE_TOO_LARGE,
        "words": Status.OK,
        "deep": Status.OK,
        "digits": Status.OK,
    }
    assert "images over 256 MiB (quarantined): 1" in errors


def test_keys_in_any_script_stay_as_they_are_and_apart(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path, rows=4)
    names = [
        "caf\u00e9",  # one character for the letter and its accent
        "cafe\u0301",  # two: it looks the same
        "🟥🔵",
        "👩‍👩‍👧",
        "中文/日本語",
        "עברית",
        "a b\tc",
        "x" * 5_000,
        "/".join(["folder"] * 300),
    ]
    members = [
        (f"{name}.{end}", data) for name in names for end, data in [("jpg", JPEG), ("json", JSON)]
    ]
    tiny.write_tar(tmp_path / "shards" / "train-1.tar", members)
    store = extracted(run_file)
    assert list(statuses(store, "image/vit")) == names
    assert set(statuses(store, "image/vit").values()) == {Status.OK}
    assert store.rows == 2 + len(names)


LONG = "a red circle " * 500_000  # 6.5 MB
CUT = "texts over 1 MiB (cut there)"


def table_of_long_captions(folder: Path, form: str) -> Path:
    """Three pictures, of which the second has a long caption."""
    for seed in range(3):
        (folder / f"{seed}.jpg").write_bytes(tiny.encoded(tiny.picture(seed)))
    rows = [{"image": f"{i}.jpg", "caption": LONG if i == 1 else "a star"} for i in range(3)]
    path = folder / f"table.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_caption_is_cut_at_1_mib_in_every_kind_of_table(form: str, tmp_path: Path) -> None:
    source = FolderSource(kind="folder", path=table_of_long_captions(tmp_path, form))
    index = build_index(source.open(), tmp_path / "index.parquet")
    captions = index.rows_between(0, 3, ("caption/caption",)).column(0).to_pylist()
    assert captions == ["a star", LONG[: 1 << 20], "a star"]
    assert index.counts[CUT] == 1


def test_a_line_that_would_take_all_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    with path.open("wb") as file:
        file.write(b'{"image": "a.jpg"}\n{"image": "b.jpg", "caption": "')
        file.truncate(8 * GIGABYTE)
    source = FolderSource(kind="folder", path=path)
    with pytest.raises(SailError, match=r"Line 2 of .*table\.jsonl has more than 16 million"):
        build_index(source.open(), tmp_path / "index.parquet")


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 300])
def test_a_small_parquet_file_of_large_captions_takes_little_memory(
    rows: int, tmp_path: Path
) -> None:
    run_file = tiny.world(tmp_path, rows=4)
    for row in range(rows):
        (tmp_path / f"a{row}.jpg").write_bytes(JPEG)
    numbers = pa.array([0] * rows, pa.int32())
    captions = pa.DictionaryArray.from_arrays(numbers, ["star " * (60_000_000 // 5)])
    table = pa.table({"image": [f"a{i}.jpg" for i in range(rows)], "caption": captions})
    pq.write_table(table, tmp_path / "t.parquet", compression="zstd", store_schema=False)
    assert (tmp_path / "t.parquet").stat().st_size < 1 << 20
    tars = 'kind = "webdataset"\npath = "shards/train-*.tar"'
    settings = run_file.read_text().replace(tars, 'kind = "folder"\npath = "t.parquet"')
    run_file.write_text(settings)
    command = ["-m", "pipeline.cli", "extract", str(run_file)]
    peak, errors = peak_bytes_of(command, cwd=ROOT)
    assert peak < 2 * GIGABYTE, errors
    assert CUT in errors
