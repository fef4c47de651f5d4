"""Servers that drop connections, answer 503, cut bodies short, have no ranges, or lose files."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
import zarr
from pydantic import TypeAdapter

from features.errors import SourceError, StorageError, StoreError
from features.index import Index, SampleReader, build_index, find_changes
from features.sources import Source
from features.sources.webdataset import WebdatasetSource
from features.storage import files, remote
from features.storage import groups as publish
from features.storage import remote as objects
from features.storage.place import Place, RemotePath, as_place
from features.storage.requests import read_ranges
from features.store import FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.run.config import load_config
from pipeline.run.extract import extract
from pipeline.stores.verify import verify_store
from tests import tiny
from tests.feature_stores import make_store
from tests.servers import Bucket, Fault, Proxy, Server, WebServer, reach_s3


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let retries wait but shortly, and give up soon."""
    short, long = timedelta(milliseconds=2), timedelta(milliseconds=20)
    backoff = {"init_backoff": short, "max_backoff": long, "base": 2}
    monkeypatch.setitem(objects.RETRY, "backoff", backoff)
    monkeypatch.setitem(objects.RETRY, "max_retries", 4)
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.001)


def sometimes(number: int, _method: str, wanted: str | None) -> str | None:
    """Let three of ten requests fail, each in another way; a fourth sends half a range as whole."""
    fault = {2: "drop", 4: "503", 7: "truncate", 9: "shorten"}.get(number % 10)
    return None if fault == "shorten" and wanted is None else fault


def always(fault: str) -> Fault:
    """Let every reading request fail."""
    return lambda _number, method, _wanted: fault if method == "GET" else None


def indexed(folder: Path, **settings: Any) -> Index:
    source: Source = TypeAdapter(Source).validate_python(settings)
    return build_index(source.open(), folder / "index.parquet")


def images(index: Index) -> list[bytes | None]:
    return SampleReader(index).read(0, index.rows)


@dataclass(frozen=True)
class Extraction:
    """A small extraction from S3 to S3, and the bytes that a local one gives."""

    run_file: Path
    overrides: list[str]
    s3: Bucket

    def run(self) -> None:
        extract(load_config(str(self.run_file), self.overrides), StopRequest())

    def found(self) -> dict[str, bytes]:
        return without_root(self.s3.content("stores/train.zarr"))

    def expected(self) -> dict[str, bytes]:
        extract(load_config(str(self.run_file)), StopRequest())
        local = self.run_file.parent / "run" / "features" / "train.zarr"
        files = (path for path in local.rglob("*") if path.is_file())
        return without_root(
            {path.relative_to(local).as_posix(): path.read_bytes() for path in files}
        )


def without_root(files: dict[str, bytes]) -> dict[str, bytes]:
    """Leave out the metadata that name the source."""
    named = ("zarr.json", "manifest/zarr.json")
    return {name: content for name, content in files.items() if name not in named}


@pytest.fixture
def extraction(tmp_path: Path, s3: Bucket) -> Extraction:
    run_file = tiny.world(tmp_path, rows=24)
    s3.upload(tmp_path / "shards", "shards")
    overrides = [
        f"run.dir={tmp_path / 'elsewhere'}",
        f"extract.store={s3.url('stores')}",
        f"data.train.path={s3.url('shards/train-*.tar')}",
        f"data.test.path={s3.url('shards/test-*.tar')}",
    ]
    return Extraction(run_file, overrides, s3)


@pytest.mark.slow
def test_an_extraction_through_a_failing_network_ends_with_the_bytes_of_a_local_one(
    extraction: Extraction, s3_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Proxy(s3_port, sometimes) as proxy:
        reach_s3(proxy.port, monkeypatch)
        extraction.run()
        assert verify_store(as_place(extraction.s3.url("stores/train.zarr"))) == []
        assert {"drop", "503", "truncate", "shorten"} <= set(proxy.faults)
    assert extraction.found() == extraction.expected()


@pytest.mark.slow
@pytest.mark.parametrize("requests", [90, 160])
def test_a_server_that_goes_away_stops_the_run_and_the_next_one_goes_on(
    requests: int, extraction: Extraction, s3_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Proxy(s3_port, lambda number, *_: "drop" if number >= requests else None) as proxy:
        reach_s3(proxy.port, monkeypatch)
        with pytest.raises(StorageError, match="what is done is kept"):
            extraction.run()
    reach_s3(s3_port, monkeypatch)
    extraction.run()
    assert extraction.found() == extraction.expected()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("503", r"503 Service Unavailable \(after 4 retries\)"),
        ("429", r"429 Too Many Requests \(after 4 retries\)"),
        ("drop", r"error sending request \(after 4 retries\)"),
        ("truncate", "request or response body error"),
        ("shorten", r"50 bytes came from byte 0, 100 were asked for, 5 times"),
    ],
)
def test_a_server_that_keeps_failing_is_named_with_what_it_did(
    fault: str, words: str, s3: Bucket, s3_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write(as_place(s3.url("file")), bytes(100))
    with Proxy(s3_port, always(fault)) as proxy:
        reach_s3(proxy.port, monkeypatch)
        with pytest.raises(StorageError, match=words) as caught:
            read_ranges(place(s3.url("file")), [(0, 100)])
    assert str(caught.value).startswith(s3.url("file"))
    assert "expected" in str(caught.value)
    assert f"127.0.0.1:{proxy.port}" not in str(caught.value)


def test_a_refused_credential_is_told_without_it(
    s3: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:very-secret@127.0.0.1:1")
    with pytest.raises(StorageError, match="credentials in the environment") as caught:
        files.read(as_place(s3.url("file")))
    assert "very-secret" not in str(caught.value)


def test_shards_on_a_web_server_are_read_by_ranges_in_few_requests(tmp_path: Path) -> None:
    tiny.write_tar(tmp_path / "s-0.tar", tiny.samples(100))
    tiny.write_tar(tmp_path / "s-1.tar", tiny.samples(5, first=100))
    local = indexed(tmp_path / "local", kind="webdataset", path=str(tmp_path / "s-*.tar"))
    with WebServer(tmp_path) as server, Proxy(server.port) as proxy:
        url = f"http://127.0.0.1:{proxy.port}/s-{{0..1}}.tar"
        index = indexed(tmp_path / "remote", kind="webdataset", path=url)
        assert index.rows_between(0, 105, ("key", "offset", "size", "caption/long")).equals(
            local.rows_between(0, 105, ("key", "offset", "size", "caption/long"))
        )
        assert len(proxy.requests) <= 8  # of each: is it there, how long, its content, its version
        assert images(index) == images(local)
        assert len(proxy.requests) <= 10


class Redirecting(Server):
    """Leads every request to another server."""

    def __init__(self, target: str) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(302)
                self.send_header("Location", f"{target}{self.path}")
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(Handler)


READERS: dict[str, Callable[[Any], object]] = {
    "whole": files.read,
    "version": files.version,
    "range": lambda place: read_ranges(place, [(0, 10)]),
    "zarr": lambda place: zarr.open_group(files.zarr_store(place), mode="r"),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_redirect_into_the_network_of_this_machine_is_not_followed(
    kind: str, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_bytes(bytes(20))
    with (
        WebServer(tmp_path) as internal,
        Proxy(internal.port) as watched,
        Redirecting(f"http://127.0.0.1:{watched.port}") as server,
    ):
        with pytest.raises(StorageError, match=r"leads to 127\.0\.0\.1, an internal address"):
            READERS[kind](as_place(f"http://127.0.0.1:{server.port}/secret"))
        assert watched.requests == []


@pytest.mark.parametrize(
    "target",
    [
        *("http://127.0.0.1:1", "http://[::1]:1", "http://169.254.169.254", "http://10.0.0.1"),
        *("http://[::ffff:10.0.0.1]", "http://0.0.0.0", "http://localhost:1", "http://2130706433"),
        *("file:///etc/passwd", "ftp://127.0.0.1"),
    ],
)
def test_no_internal_address_is_led_to(target: str) -> None:
    with Redirecting(target) as server, pytest.raises(StorageError, match="it leads to"):
        files.read(as_place(f"http://127.0.0.1:{server.port}/secret"))


def test_a_redirect_within_a_server_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"content")

    class Moved(WebServer):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder)
            answer = self._server.RequestHandlerClass.answer  # type: ignore[attr-defined]

            def moved(handler: Any) -> None:
                if handler.path == "/here":
                    handler.send(301, [("Location", "/there")], b"")
                else:
                    answer(handler)

            self._server.RequestHandlerClass.answer = moved  # type: ignore[attr-defined]

    with Moved(tmp_path) as server:
        assert files.read(as_place(f"http://127.0.0.1:{server.port}/here")) == b"content"


def test_a_web_server_without_ranges_is_refused(tmp_path: Path) -> None:
    tiny.write_tar(tmp_path / "s.tar", tiny.samples(2))
    with WebServer(tmp_path, ranges=False) as server:
        url = f"http://127.0.0.1:{server.port}/s.tar"
        with pytest.raises(StorageError, match=r"/s\.tar .* sends whole files only"):
            indexed(tmp_path / "remote", kind="webdataset", path=url)


def test_names_on_a_web_server_cannot_be_a_pattern_with_a_star(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"has no listing.*shard-\{00000\.\.00010\}\.tar"):
        indexed(tmp_path, kind="webdataset", path="http://127.0.0.1:1/s-*.tar")


def test_class_folders_on_a_web_server_are_refused() -> None:
    settings = {"kind": "classes", "path": "http://127.0.0.1:1/images"}
    with pytest.raises(StorageError, match=r"/images cannot be listed: a web server has no list"):
        TypeAdapter[Source](Source).validate_python(settings).open()


def test_a_name_that_a_web_server_does_not_have_is_told(tmp_path: Path) -> None:
    tiny.write_tar(tmp_path / "s-0.tar", tiny.samples(2))
    with WebServer(tmp_path) as server:
        url = f"http://127.0.0.1:{server.port}/s-{{0..1}}.tar"
        with pytest.raises(SourceError, match=r"No file matches http://.*/s-1\.tar"):
            indexed(tmp_path / "remote", kind="webdataset", path=url)


def test_a_shard_on_s3_that_changed_since_it_was_indexed_is_refused(
    tmp_path: Path, s3: Bucket
) -> None:
    tiny.write_tar(tmp_path / "shards" / "s.tar", tiny.samples(2))
    tiny.write_tar(tmp_path / "shards" / "t.tar", tiny.samples(1, first=9))
    s3.upload(tmp_path / "shards", "shards")
    source = WebdatasetSource(kind="webdataset", path=s3.url("shards/*.tar"))
    index = build_index(source.open(), tmp_path / "index.parquet")
    assert not find_changes(index, source.open(index.names))
    tiny.write_tar(tmp_path / "shards" / "s.tar", tiny.samples(2, first=5))
    s3.upload(tmp_path / "shards", "shards")
    with pytest.raises(SourceError, match=r"s\.tar has changed since it was indexed"):
        find_changes(index, source.open(index.names))
    files.delete(as_place(s3.url("shards/s.tar")))
    with pytest.raises(SourceError, match=r"s\.tar is gone"):
        find_changes(index, source.open(index.names))


def test_a_shard_on_s3_that_got_shorter_is_told_when_it_is_read(tmp_path: Path, s3: Bucket) -> None:
    shard = tiny.write_tar(tmp_path / "shards" / "s.tar", tiny.samples(2))
    s3.upload(tmp_path / "shards", "shards")
    index = indexed(tmp_path, kind="webdataset", path=s3.url("shards/*.tar"))
    shard.write_bytes(shard.read_bytes()[:1000])
    s3.upload(tmp_path / "shards", "shards")
    with pytest.raises(
        SourceError, match=r"s\.tar has 1000 bytes, and had more when it was indexed"
    ):
        images(index)


def test_a_store_whose_upload_was_cut_off_is_none_and_is_made_anew(
    tmp_path: Path, s3: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_tar(tmp_path / "s.tar", tiny.samples(30))
    index = indexed(tmp_path, kind="webdataset", path=str(tmp_path / "s.tar"))
    url = as_place(s3.url("train.zarr"))
    put = obstore.put
    left = 5

    def cut_off(*arguments: Any, **options: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        put(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(obstore, "put", cut_off)
        with pytest.raises(KeyboardInterrupt):
            FeatureStore.create(url, index, rows_per_chunk=8)
    assert not FeatureStore.is_at(url)
    files.write(url / "caption/left-behind/zarr.json", b"{}")
    store = FeatureStore.create(url, index, rows_per_chunk=8)
    assert store.fields == ("long", "short")
    assert store.keys().tolist() == index.rows_between(0, 30).column("key").to_pylist()


def test_a_writer_that_is_slower_leaves_alone_what_the_faster_one_has_made(
    tmp_path: Path, s3: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_tar(tmp_path / "s.tar", tiny.samples(8))
    index = indexed(tmp_path, kind="webdataset", path=str(tmp_path / "s.tar"))
    url = as_place(s3.url("train.zarr"))
    listed = files.files_below

    def make_column() -> None:
        store = FeatureStore.create(url, index, rows_per_chunk=8)
        store.add_encoder("image/eye", {"model": "eye"}, dim=3)
        ones = np.ones((8, 3), dtype=np.float16)
        store.column("image/eye").write(0, ones, np.ones(8, dtype=np.uint8))

    def list_too_late(place: Place) -> Iterator[tuple[Place, int]]:
        monkeypatch.setattr(publish, "files_below", listed)
        make_column()
        return listed(place)

    monkeypatch.setattr(publish, "files_below", list_too_late)
    store = FeatureStore.create(url, index, rows_per_chunk=8)
    assert store.column("image/eye").pending() == []
    assert (store.column("image/eye").read(0, 8) == 1).all()


def test_a_store_on_a_web_server_is_read_if_its_metadata_are_consolidated(tmp_path: Path) -> None:
    store = make_store(tmp_path / "train.zarr")
    with WebServer(tmp_path) as server:
        url = as_place(f"http://127.0.0.1:{server.port}/train.zarr")
        with pytest.raises(StoreError, match=r"Call `zarr\.consolidate_metadata`"):
            FeatureStore.open(url).columns()
        with pytest.warns(UserWarning, match="Consolidated metadata"):
            zarr.consolidate_metadata(tmp_path / "train.zarr")
        found = FeatureStore.open(url)
        assert found.fields == store.fields
        assert found.columns() == store.columns()
        a, b = (each.column(each.columns()[0]) for each in (store, found))
        assert b.pending() == []
        assert (a.status() == b.status()).all()
        assert (a.read(5, 50) == b.read(5, 50)).all()
        with pytest.raises(StorageError, match=r"http:// is only read.*extract\.store"):
            found.add_encoder("image/other", {"dim": 3}, dim=3)


def place(url: str) -> RemotePath:
    found = as_place(url)
    assert isinstance(found, RemotePath)
    return found
