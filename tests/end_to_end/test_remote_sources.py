"""Each kind of source under each kind of URL: the rows and the images of the same files on disk."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfFileSystem
from pydantic import TypeAdapter

from features.errors import SourceError
from features.index import Index, SampleReader, build_index, find_changes, update_index
from features.sources import Source
from features.storage import remote as objects
from features.storage.place import as_place
from features.store import FeatureStore
from tests import tiny
from tests.feature_stores import make_store
from tests.servers import Bucket, HubServer, Proxy, WebServer

COMPARED = ("key", "offset", "size", "problem", "label", "group")


@pytest.fixture
def url_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of the folder `data` of the test, which a server of the kind has."""
    folder = request.getfixturevalue("tmp_path") / "data"
    if request.param in ("s3", "gs"):
        s3: Bucket = request.getfixturevalue("s3")
        port: int = request.getfixturevalue("s3_port")
        with Proxy(port) as proxy:
            google_cloud(folder.parent / "account.json", proxy.port, monkeypatch)
            yield f"{request.param}://{s3.name}/data"
    elif request.param == "hf":
        with HubServer(folder, "owner/name") as server:
            server.reach(monkeypatch)
            yield "hf://datasets/owner/name"
        HfFileSystem.clear_instance_cache()
    else:
        with WebServer(folder) as server:
            yield f"http://127.0.0.1:{server.port}"


def google_cloud(account: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let gs:// lead to a port on loopback, without TLS and credentials."""
    empty = dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
    server = {"gcs_base_url": f"http://127.0.0.1:{port}", "disable_oauth": True}
    account.write_text(json.dumps(empty | server))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(account))
    monkeypatch.setitem(objects.CLIENT, "allow_http", True)


def tars(folder: Path) -> dict[str, str]:
    for number in (0, 1):
        members = tiny.samples(5, first=5 * number)
        tiny.write_tar(folder / f"s-{number}.tar", [*members, ("broken.txt", b"no image")])
    return {"kind": "webdataset", "path": "ROOT/s-{0..1}.tar"}


def parquet(folder: Path) -> dict[str, str]:
    images = [tiny.encoded(tiny.picture(seed)) for seed in range(7)]
    rows = [{"image": image, "caption": tiny.caption(i)} for i, image in enumerate(images)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=3)
    return {"kind": "parquet", "path": "ROOT/a.parquet"}


def table(folder: Path) -> dict[str, str]:
    names = ["é 1.jpg", "sub/2.jpg", "./sub/3#.jpg", "gone.jpg", "x" * 5000, "a\n\x01.jpg"]
    for seed, name in enumerate(names[:3]):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(tiny.encoded(tiny.picture(seed)))
    lines = [{"image": name, "caption": tiny.caption(i)} for i, name in enumerate(names)]
    (folder / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"kind": "folder", "path": "ROOT/t.jsonl"}


def class_folders(folder: Path) -> dict[str, str]:
    for name in ("cat", "dog"):
        (folder / "images" / name).mkdir(parents=True)
        for seed in range(3):
            content = tiny.encoded(tiny.picture(seed))
            (folder / "images" / name / f"{seed}.jpg").write_bytes(content)
    (folder / "images" / "dog" / "notes.txt").write_text("no image")
    (folder / "names.json").write_text(json.dumps({"classes": ["cat", "dog"]}))
    return {"kind": "classes", "path": "ROOT/images", "names": "ROOT/names.json"}


CASES = [
    pytest.param(kind, write, id=f"{write.__name__}-{kind}")
    for kind in ("s3", "gs", "hf", "http")
    for write in (tars, parquet, table, class_folders)
    if (kind, write) != ("http", class_folders)  # a web server lists no folders
]


@pytest.mark.parametrize(("url_of", "write"), CASES, indirect=["url_of"])
def test_it_gives_the_rows_and_images_of_the_files_on_disk(
    url_of: str,
    write: Callable[[Path], dict[str, str]],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    (tmp_path / "data").mkdir()
    settings = write(tmp_path / "data")
    if url_of.startswith(("s3", "gs")):
        request.getfixturevalue("s3").upload(tmp_path / "data", "data")
    local, there = (
        built(tmp_path / name, {key: text.replace("ROOT", root) for key, text in settings.items()})
        for name, root in [("local", str(tmp_path / "data")), ("there", url_of)]
    )
    columns = (*COMPARED, *(f"caption/{field}" for field in local.fields))
    assert there.rows_between(0, there.rows, columns).equals(
        local.rows_between(0, local.rows, columns)
    )
    assert (there.fields, there.class_names) == (local.fields, local.class_names)
    assert there.counts == local.counts
    images = SampleReader(there).read(0, there.rows)
    assert images == SampleReader(local).read(0, local.rows)
    assert sum(image is not None for image in images) >= 3


@pytest.mark.parametrize("url_of", ["s3", "gs", "hf"], indirect=True)
def test_a_store_is_read_from_any_server_that_lists_its_files(
    tmp_path: Path, url_of: str, request: pytest.FixtureRequest
) -> None:
    local = make_store(tmp_path / "data" / "train.zarr", bad_images=(3,))
    if url_of.startswith(("s3", "gs")):
        request.getfixturevalue("s3").upload(tmp_path / "data", "data")
    found = FeatureStore.open(as_place(f"{url_of}/train.zarr"))
    assert found.columns() == local.columns()
    assert found.captions("long").tolist() == local.captions("long").tolist()
    for name in found.columns():
        a, b = local.column(name), found.column(name)
        assert b.pending() == []
        assert (a.status() == b.status()).all()
        assert (a.read(5, 190) == b.read(5, 190)).all()


def built(folder: Path, settings: dict[str, str]) -> Index:
    source: Source = TypeAdapter(Source).validate_python(settings)
    return build_index(source.open(), folder / "index.parquet")


def test_a_copy_under_a_url_goes_on_by_its_content_and_a_changed_one_is_refused(
    tmp_path: Path,
) -> None:
    """Another ETag says little: that of a copy, or of an upload in parts, differs."""
    tar = tiny.write_tar(tmp_path / "data" / "a.tar", tiny.samples(5))
    with WebServer(tmp_path / "data") as server:
        settings = {"kind": "webdataset", "path": f"http://127.0.0.1:{server.port}/a.tar"}
        source: Source = TypeAdapter(Source).validate_python(settings)
        index = build_index(source.open(), tmp_path / "index.parquet")
        os.utime(tar, (1, 1))
        again = source.open(index.names)
        changes = find_changes(index, again)
        assert changes.tables
        assert update_index(index, again, changes, append=False).rows == 5
        other = tar.read_bytes().replace(b'"label": 3', b'"label": 4')
        tar.write_bytes(other)
        index = Index.open(index.path)
        again = source.open(index.names)
        with pytest.raises(SourceError, match="has label = 3, but the source gives 4 now"):
            update_index(index, again, find_changes(index, again), append=False)
        tar.write_bytes(other + bytes(512))
        with pytest.raises(SourceError, match=r"a\.tar has changed since it was indexed"):
            find_changes(index, source.open(index.names))
