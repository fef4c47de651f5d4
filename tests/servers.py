"""Real servers on loopback: S3, a web server with or without ranges, and a proxy that fails."""

import hashlib
import http.client
import json
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import obstore
import pytest
from huggingface_hub import HfFileSystem, constants
from obstore.store import S3Store

Fault = Callable[[int, str, str | None], str | None]
"""From the number of a request, its method and its range to what goes wrong with it."""


OWN_HEADERS = frozenset({"content-length", "transfer-encoding", "connection", "date", "server"})

SIGNED = (
    "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, "
    "Signature=0"
)


class Server:
    """A threaded HTTP server on a free port; use it with `with`."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        often = {"poll_interval": 0.01}  # seconds until `shutdown` is noticed; 0.5 if not given
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs=often, daemon=True
        )
        self.port = int(self._server.server_port)

    def __enter__(self) -> "Server":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Proxy(Server):
    """Passes requests on to another server, and lets some of them fail.

    Faults: `drop` closes the connection without an answer, `429` and `503` answer that, `truncate`
    closes it in the middle of the body, `shorten` sends half of the body as if it were all.
    """

    def __init__(self, upstream: int, fault: Fault = lambda *_: None) -> None:
        self.requests: list[tuple[str, str, str | None]] = []
        """Method, path and range of each request."""
        self.faults: list[str] = []
        lock = threading.Lock()
        proxy = self

        class Handler(_Quiet):
            def answer(self) -> None:
                with lock:
                    number = len(proxy.requests)
                    wanted = self.headers.get("Range")
                    proxy.requests.append((self.command, self.path, wanted))
                    failing = fault(number, self.command, wanted)
                    if failing:
                        proxy.faults.append(failing)
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if failing == "drop":
                    self.close_connection = True
                elif failing in ("429", "503"):
                    self.send(int(failing), [], b"")
                else:
                    self.send(*self.upstream_answer(body), fault=failing)

            def upstream_answer(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
                connection = http.client.HTTPConnection("127.0.0.1", upstream)
                # So a server that speaks S3 takes requests to Google Cloud too.
                path = self.path.replace("%2F", "/")
                headers = dict(self.headers)
                if not headers.get("authorization", "").startswith("AWS"):
                    headers["authorization"] = SIGNED
                connection.request(self.command, path, body, headers)
                response = connection.getresponse()
                content = response.read()
                connection.close()
                return response.status, response.getheaders(), content

        super().__init__(Handler)

    def __enter__(self) -> "Proxy":
        super().__enter__()
        return self


class WebServer(Server):
    """Serves the files of a folder, by ranges or (as the simplest servers do) only whole."""

    def __init__(self, folder: Path, *, ranges: bool = True) -> None:
        class Handler(_Quiet):
            def answer(self) -> None:
                file = folder / unquote(self.path).lstrip("/")
                if not file.is_file():
                    self.send(404, [], b"")
                    return
                content = file.read_bytes()
                self.send_part(content, ("ETag", f'"{file.stat().st_mtime_ns:x}"'))

            def send_part(self, content: bytes, *headers: tuple[str, str]) -> None:
                if ranges:
                    super().send_part(content, *headers)
                else:
                    self.send(200, [*headers], content)

        super().__init__(Handler)


class HubServer(Server):
    """Answers as the Hugging Face hub does for one repository, whose files are those of a folder.

    The folder is the branch `main`; a further branch has a folder of its own. A commit is the sha1
    of the name of its branch.
    """

    def __init__(
        self,
        folder: Path,
        repository: str,
        *,
        card: dict[str, Any] | None = None,
        branches: dict[str, Path] | None = None,
        kind: str = "datasets",
    ) -> None:
        self._api = f"/api/{kind}/{repository}"
        self._content = f"/{'' if kind == 'models' else f'{kind}/'}{repository}/resolve/"
        self._about = {"id": repository, "cardData": card or {}}
        self._branches = {"main": folder, **(branches or {})}
        hub = self

        class Handler(_Quiet):
            def answer(self) -> None:
                path, _, query = unquote(self.path).partition("?")
                found = hub.found(path, all_below="recursive=true" in query.lower())
                if isinstance(found, Path):
                    content = found.read_bytes()
                    etag = hashlib.sha256(content).hexdigest()
                    commit = ("X-Repo-Commit", commit_of("main"))
                    self.send_part(content, ("ETag", f'"{etag}"'), commit)
                elif found is None:
                    self.send(404, [("X-Error-Code", hub.error(path))], b"")
                else:
                    headers = [("Content-Type", "application/json")]
                    self.send(200, headers, json.dumps(found).encode())

        super().__init__(Handler)

    def found(self, path: str, *, all_below: bool = False) -> object:
        """A file, or what is said of the dataset or a folder; None where there is nothing."""
        if path in (self._api, f"{self._api}/revision/main"):
            return self._told("main")
        part, is_tree = self._content, path.startswith(f"{self._api}/tree/")
        if is_tree or path.startswith(f"{self._api}/revision/"):
            part = f"{self._api}/{'tree' if is_tree else 'revision'}/"
        for branch, folder in self._branches.items():
            for revision in (branch, commit_of(branch)):
                name = path.removeprefix(f"{part}{revision}")
                if name != path and name[:1] in ("", "/"):
                    return self._inside(part, branch, folder, name.strip("/"), all_below)
        return None

    def _inside(self, part: str, branch: str, folder: Path, name: str, all_below: bool) -> object:
        if part.endswith("/revision/"):
            return self._told(branch)
        if part == self._content:
            return folder / name if (folder / name).is_file() else None
        if not (folder / name).is_dir():
            return None
        return _listed_on_the_hub(folder, name, "**/*" if all_below else "*")

    def _told(self, branch: str) -> dict[str, Any]:
        folder = self._branches[branch]
        files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
        siblings = [{"rfilename": file.as_posix()} for file in sorted(files)]
        return self._about | {"sha": commit_of(branch), "siblings": siblings}

    def error(self, path: str) -> str:
        """The code that the hub gives for what it has not."""
        if not path.startswith((f"{self._api}/", self._content)):
            return "RepoNotFound"
        return "RevisionNotFound" if "/revision/" in path else "EntryNotFound"

    def __enter__(self) -> "HubServer":
        super().__enter__()
        return self

    def reach(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let hf:// and the hub's client lead here."""
        endpoint = f"http://127.0.0.1:{self.port}"
        template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        HfFileSystem.clear_instance_cache()


def commit_of(branch: str) -> str:
    """The commit of a branch of `HubServer`."""
    return hashlib.sha1(branch.encode(), usedforsecurity=False).hexdigest()


class Bucket:
    """A bucket of an S3 server, looked at from outside the program."""

    def __init__(self, port: int, name: str) -> None:
        self.name = name
        self._connection = http.client.HTTPConnection("127.0.0.1", port)
        self._connection.request("PUT", f"/{name}")
        self._connection.getresponse().read()
        self._store = S3Store(
            name,
            endpoint=f"http://127.0.0.1:{port}",
            access_key_id="test",
            secret_access_key="test",
            region="us-east-1",
            client_options={"allow_http": True},
        )

    def url(self, path: str) -> str:
        """The URL of a path in the bucket."""
        return f"s3://{self.name}/{path}"

    def upload(self, folder: Path, prefix: str) -> None:
        """Copy a folder under a prefix."""
        for file in folder.rglob("*"):
            if file.is_file():
                key = f"{prefix}/{file.relative_to(folder).as_posix()}"
                obstore.put(self._store, key, file.read_bytes())

    def remove(self, path: str) -> None:
        """Delete an object."""
        obstore.delete(self._store, path)

    def content(self, prefix: str) -> dict[str, bytes]:
        """What lies under a prefix."""
        listed = [entry for entries in obstore.list(self._store, prefix) for entry in entries]
        return {
            entry["path"].removeprefix(f"{prefix}/"): bytes(
                obstore.get(self._store, entry["path"]).bytes()
            )
            for entry in listed
        }


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """The port of an S3 server that lives as long as the tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the server's own imports
        from moto.server import ThreadedMotoServer
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def s3(s3_port: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty bucket, with the environment that leads to it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    reach_s3(s3_port, monkeypatch)
    return Bucket(s3_port, f"b{abs(hash(request.node.nodeid))}")


def reach_s3(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let s3:// lead to a port on loopback, and retries wait but shortly."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")


def _listed_on_the_hub(root: Path, folder: str, which: str) -> list[dict[str, object]]:
    listed: list[dict[str, object]] = []
    for path in sorted((root / folder).glob(which)):
        content = path.read_bytes() if path.is_file() else b""
        about: dict[str, object] = {
            "type": "file" if path.is_file() else "directory",
            "path": path.relative_to(root).as_posix(),
            "oid": hashlib.sha1(content, usedforsecurity=False).hexdigest(),
            "size": len(content),
        }
        listed.append(about)
    return listed


class _Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self) -> None:
        raise NotImplementedError

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    def send_part(self, content: bytes, *headers: tuple[str, str]) -> None:
        wanted = self.headers.get("Range")
        if wanted is None:
            self.send(200, [*headers], content)
            return
        first, last = wanted.removeprefix("bytes=").split("-")
        part = content[int(first) : int(last) + 1]
        place = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        self.send(206, [*headers, ("Content-Range", place)], part)

    def send(
        self,
        status: int,
        headers: list[tuple[str, str]],
        content: bytes,
        fault: str | None = None,
    ) -> None:
        if fault == "shorten":
            content = content[: len(content) // 2]
        given = {name.lower(): value for name, value in headers}
        length = given.get("content-length") if self.command == "HEAD" else None
        self.send_response(status)
        for name, value in given.items():
            if name not in OWN_HEADERS:
                self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "truncate":
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)
