"""What the page of a run asks for, and what it is never given."""

import io
import json
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.routing import APIRoute
from PIL import Image
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient

from features.errors import ConfigError
from features.store import FeatureStore
from pipeline.explore.app import STATIC, Access, create_app, router
from pipeline.explore.search import MAX_UPLOAD_BYTES
from pipeline.explore.server import MOST_AT_ONCE
from pipeline.explore.session import Session
from pipeline.run.config import load_config
from tests import tiny
from tests.clusters import begin, finish
from tests.commands import sail
from tests.explored import BROKEN, make_run, served


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def page(run: Path) -> Iterator[TestClient]:
    app = create_app(Session(run, device="cpu"), Access("127.0.0.1"))
    with TestClient(app, base_url="http://127.0.0.1:8642") as client:
        yield client


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    """The page as a server of its own: what a client would tidy up in a path arrives as it is."""
    with served(run) as address:
        yield address


def test_connections_that_send_nothing_keep_nobody_out(address: str) -> None:
    place = urllib.parse.urlsplit(address)
    with ExitStack() as idle:
        for number in range(3 * MOST_AT_ONCE):
            opened = socket.create_connection((str(place.hostname), int(place.port or 0)))
            idle.enter_context(opened)
            if number % 2:
                opened.sendall(b"GET / HTTP/1.1\r\n")  # and never the rest of it
        for _ in range(3):
            with urllib.request.urlopen(f"{address}api/run", timeout=10) as answer:
                assert answer.status == 200


def test_headers_that_do_not_come_end_a_connection(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.explore.server.SECONDS_FOR_HEADERS", 0.2)
    place = urllib.parse.urlsplit(address)
    with socket.create_connection((str(place.hostname), int(place.port or 0)), 10) as opened:
        opened.sendall(b"GET / HTTP/1.1\r\nHost: 127")
        with suppress(ConnectionResetError):
            assert opened.recv(1) == b""


@pytest.fixture(scope="module")
def store(run: Path) -> FeatureStore:
    return FeatureStore.open(run / "features" / "test.zarr")


def given(page: TestClient, path: str, **parameters: Any) -> Any:
    answer = page.get(path, params=parameters)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(page: TestClient, status: int, path: str, **parameters: Any) -> str:
    answer = page.get(path, params=parameters)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert isinstance(error, str)
    return error


def test_words_an_image_and_a_row_find_what_sail_search_finds(
    page: TestClient, run: Path, store: FeatureStore
) -> None:
    words = str(store.captions("long")[5])
    for among in ("images", "captions"):
        expected = json.loads(sail("search", run, words, "--among", among, "--json").stdout)
        found = given(page, "/api/search", split="test", text=words, among=among, top=10)
        cosines = [hit["cosine"] for hit in expected]  # some are equal, in any order
        assert [hit["cosine"] for hit in found["hits"]] == pytest.approx(cosines, abs=1e-3)
        certain = {hit["key"] for hit in expected if hit["cosine"] > cosines[-1] + 1e-3}
        assert certain <= {hit["key"] for hit in found["hits"]}
    assert found["hits"][0]["field"] == "long"
    expected = json.loads(sail("search", run, words, "--score", "csls", "--json").stdout)
    found = given(page, "/api/search", split="test", text=words, score="csls", top=10)
    assert [hit["row"] for hit in found["hits"]] == [hit["row"] for hit in expected]
    picture = page.get("/image/test/5", params={"side": 256}).content
    sent = page.post("/api/search", params={"split": "test", "top": 1}, content=picture).json()
    alike = given(page, "/api/similar", split="test", row=5, top=3)
    assert sent["hits"][0]["row"] == alike["hits"][0]["row"] == 5
    assert sent["searched"] == 15
    assert alike["hits"][0]["cosine"] == pytest.approx(1, abs=1e-3)
    assert alike["hits"][0]["label"] == "one"


def test_a_row_says_what_became_of_it(page: TestClient, store: FeatureStore) -> None:
    facts = given(page, "/api/row", split="test", row=BROKEN)
    assert facts["key"] == str(store.keys()[BROKEN])
    assert facts["columns"]["image/vit"]["status"] == "truncated image"
    assert facts["columns"]["text/bert/long"]["status"] == "ok"
    assert "has no embedding" in refused(page, 409, "/api/similar", split="test", row=BROKEN)
    assert "cannot be shown" in refused(page, 404, f"/image/test/{BROKEN}")
    for path in ("/api/row", "/api/shown"):
        assert "has no row 99. A row from 0 to 15" in refused(page, 409, path, split="test", row=99)


def test_pictures_are_made_small_and_encoded_anew(page: TestClient) -> None:
    for side in (96, 256, 768):
        answer = page.get("/image/test/0", params={"side": side})
        assert answer.headers["content-type"] == "image/jpeg"
        with Image.open(io.BytesIO(answer.content)) as image:
            assert image.size == (24, 20)
    original = tiny.encoded(tiny.picture(1000))
    assert answer.content != original
    assert "One of [96, 256, 768]" in refused(page, 422, "/image/test/0", side=4000)


@pytest.mark.parametrize(
    "path",
    [
        "/image/../0",
        "/image/..%2f..%2fconfig.toml/0",
        "/image/train/..%2f..%2fconfig.toml",
        "/image/test/-1",
        "/image/test/16",
        "/image/%2e%2e/0",
        "/image/test%00/0",
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/static/%2e%2e/app.py",
        "/static/..%5capp.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/config.toml",
        "/openapi.json",
        "/docs",
        "/api/store?split=../../..",
        "/api/rows?split=/etc",
        "/api/store/quarantine?split=test&column=../../train.zarr/image/vit",
        "/api/store/duplicates?split=test&column=/etc",
        "/api/results/failures?name=../../etc/passwd",
    ],
)
def test_nothing_outside_the_run_and_its_index_is_served(address: str, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(address.rstrip("/") + path, timeout=20)
    with refusal.value as answer:
        assert answer.code in (404, 409, 422)
        assert "error" in json.load(answer)


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that says it has side × side pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"", 409, "it has no bytes"),
        (b"no image", 409, "no image that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 409, "no image that can be read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 409, "no image that can be read"),
        (tiny.encoded(tiny.picture(0))[:200], 409, "cannot be used"),
        (bomb(60_000), 409, "60000 × 60000 pixels, more than 50000000"),
        (bytes(MAX_UPLOAD_BYTES + 1), 413, "larger than 16 MiB"),
    ],
    ids=["empty", "text", "postscript", "svg", "cut off", "bomb", "too many bytes"],
)
def test_an_image_that_is_sent_is_bounded_and_decoded_safely(
    page: TestClient, content: bytes, status: int, words: str
) -> None:
    answer = page.post("/api/search", params={"split": "test"}, content=content)
    assert answer.status_code == status
    assert words in answer.json()["error"]


def test_what_is_asked_wrongly_is_said(page: TestClient) -> None:
    assert "no split 'tset'" in refused(page, 409, "/api/search", split="tset", text="a")
    for wrong in (
        {"text": ""},
        {"text": "a" * 2001},
        {"text": "a", "top": 0},
        {"text": "a", "top": 999},
    ):
        assert "cannot be used" in refused(page, 422, "/api/search", split="test", **wrong)
    assert page.delete("/api/search").status_code == 405


def test_the_map_has_every_row_that_is_ok_and_is_drawn_once(page: TestClient, run: Path) -> None:
    facts = given(page, "/api/map", split="test")
    assert (facts["images"], facts["texts"]) == (15, 16)
    assert 0 <= facts["gap"] <= 2
    assert facts["classes"] == ["one", "two", "three", "four", "five"]
    content = page.get("/api/map/points", params={"split": "test"}).content
    size = facts["images"] + facts["texts"]
    assert len(content) == 16 * size
    places = np.frombuffer(content, "<f4", 2 * size).reshape(-1, 2)
    rows = np.frombuffer(content, "<i4", size, offset=8 * size)
    assert rows.tolist() == [row for row in range(16) if row != BROKEN] + list(range(16))
    np.testing.assert_allclose(places.mean(axis=0), 0, atol=1e-5)
    variance = places.var(axis=0)
    assert variance[0] >= variance[1]
    session = page.app.state.session  # type: ignore[attr-defined]
    vectors = np.concatenate(
        [session.images("test").embeddings, session.captions("test", facts["field"]).embeddings]
    ).astype(np.float64)
    centred = vectors - vectors.mean(axis=0)
    singular = np.linalg.svd(centred, compute_uv=False)
    np.testing.assert_allclose(variance, singular[:2] ** 2 / len(vectors), rtol=1e-4)
    explained = singular[:2] ** 2 / (singular**2).sum()
    np.testing.assert_allclose(facts["explained"], explained, rtol=1e-4)
    (kept,) = (run / "search").glob("map-*.npz")
    written = kept.stat().st_mtime_ns
    assert page.get("/api/map/points", params={"split": "test"}).content == content
    assert kept.stat().st_mtime_ns == written


def test_failures_behind_a_number_are_as_many_as_it_says(page: TestClient) -> None:
    found = given(page, "/api/results")
    assert found["is_current"]
    by_name = {each["name"]: each for each in found["results"] if each["has_rows"]}
    assert "zero_shot test top1" in by_name
    assert "retrieval/image_to_text test recall@1" in by_name
    for name in ("zero_shot test top1", "retrieval/image_to_text test recall@1"):
        failures = given(page, "/api/results/failures", name=name)
        assert failures["of"] == by_name[name]["n"] == 15
        assert failures["total"] == round(15 * (1 - by_name[name]["value"]))
        assert len(failures["rows"]) == min(failures["total"], 24)
    groups = [each for each in by_name.values() if each["task"] == "compositional"]
    assert groups
    for each in groups:
        failures = given(page, "/api/results/failures", name=each["name"])
        assert failures["of"] == each["n"] == 7  # of eight, one has the damaged image
        assert failures["failed"] == round(7 * (1 - each["value"]))
        rows = [row["row"] for row in failures["rows"]]
        assert [row // 2 for row in rows[::2]] == [row // 2 for row in rows[1::2]]
        assert failures["total"] == len(rows) == 2 * failures["failed"]
    failures = given(page, "/api/results/failures", name="zero_shot test top1")
    assert all(row["taken"] != row["label"] for row in failures["rows"])
    classes = given(page, "/api/results/classes", split="test")
    assert sum(each["images"] for each in classes["classes"]) == 15
    assert sum(each["images"] - each["right"] for each in classes["classes"]) == failures["total"]
    worst = classes["mistakes"][0]
    name = "zero_shot test top1"
    pair = {"label": worst["true"], "taken": worst["predicted"]}
    assert given(page, "/api/results/failures", name=name, **pair)["total"] == worst["count"]
    assert "are not known" in refused(page, 409, "/api/results/failures", name="no such number")


def test_curves_are_those_of_metrics_jsonl_and_come_again_only_when_it_grew(
    page: TestClient, run: Path
) -> None:
    written = (run / "align" / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in written]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    facts = given(page, "/api/training")
    curve = facts["curves"]["loss"]
    assert list(zip(curve["step"], curve["value"], strict=True)) == losses
    assert "curves" not in given(page, "/api/training", seen=facts["bytes"])
    with (run / "align" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 998, "loss": NaN}\n')
        file.write('{"step": 999, "epoch": 9.0, "loss": 0.5}\n{"step": 1000, "lo')
    grown = given(page, "/api/training", seen=facts["bytes"])
    assert (grown["step"], grown["live"]) == (999, True)
    assert grown["curves"]["loss"]["step"][-2:] == [998, 999]
    assert grown["curves"]["loss"]["value"][-2:] == [None, 0.5]


def test_the_store_view_accounts_for_every_row(page: TestClient, store: FeatureStore) -> None:
    facts = given(page, "/api/store", split="test")
    columns = {column["name"]: column for column in facts["columns"]}
    assert columns["image/vit"]["status"] == {"ok": 15, "truncated image": 1}
    assert sum(columns["image/vit"]["lengths"]["counts"]) == columns["image/vit"]["looked_at"] == 15
    bad = given(page, "/api/store/quarantine", split="test", column="image/vit")
    key = str(store.keys()[BROKEN])
    assert bad == {"total": 1, "rows": [{"row": BROKEN, "key": key, "reason": "truncated image"}]}
    alike = given(page, "/api/store/duplicates", split="test", column="image/vit")
    assert alike["compared"] == 15
    features = store.column("image/vit").read(0, 16).astype(np.float64)
    first, second = alike["pairs"][0]["rows"]
    norms = np.linalg.norm(features, axis=1)
    cosine = features[first] @ features[second] / norms[first] / norms[second]
    assert alike["pairs"][0]["cosine"] == pytest.approx(cosine, abs=1e-4)


def test_the_address_that_is_printed_asks_for_a_token_beyond_this_machine(run: Path) -> None:
    with served(run, host="0.0.0.0") as address:
        port = address.split(":")[2].split("/")[0]
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/run", timeout=20)
        with refusal.value as answer:
            assert answer.code == 401
        token = address.partition("token=")[2]
        bearer = {"Authorization": f"Bearer {token}"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/api/run", headers=bearer)
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert list(json.load(answer)["splits"]) == ["test", "train"]


def test_a_better_head_is_taken_up_while_the_page_is_served(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "align" / "checkpoints").mkdir(parents=True)
    for name in ("config.toml", "index", "features"):
        (folder / name).symlink_to(run / name)
    best = folder / "align" / "best"
    for name in ("step-1", "step-2"):
        shutil.copytree(run / "align" / "best", folder / "align" / "checkpoints" / name)
    weights = folder / "align" / "checkpoints" / "step-2" / "model.safetensors"
    tensors = load_file(weights)
    changed = {name: -it if name.startswith("image") else it for name, it in tensors.items()}
    save_file(changed, weights)
    config = weights.with_name("config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sha256": {}}))
    best.symlink_to("checkpoints/step-1")
    page = TestClient(
        create_app(Session(folder, device="cpu"), Access("127.0.0.1")), base_url="http://127.0.0.1"
    )
    before = given(page, "/api/search", split="test", text="a red circle", top=16)
    assert (
        given(page, "/api/search", split="test", text="a red circle", top=16)["hits"]
        == (before["hits"])
    )
    best.unlink()
    best.symlink_to("checkpoints/step-2")
    after = given(page, "/api/search", split="test", text="a red circle", top=16)
    expected = json.loads(sail("search", folder, "a red circle", "--top", 16, "--json").stdout)
    cosines = [hit["cosine"] for hit in after["hits"]]
    assert cosines == pytest.approx([hit["cosine"] for hit in expected], abs=1e-3)
    assert cosines != pytest.approx([hit["cosine"] for hit in before["hits"]], abs=1e-3)


@pytest.mark.slow
def test_the_command_prints_its_address_and_ends_with_a_signal(run: Path) -> None:
    command = begin("explore", str(run), "--port", "0")
    assert command.stdout is not None
    address = command.stdout.readline().strip()
    with urllib.request.urlopen(address, timeout=20) as answer:
        assert b"SAIL explore" in answer.read()
    command.send_signal(signal.SIGINT)
    rest, log = finish(command, expect=130)
    assert rest == ""
    assert "Stopped; nothing of the run was changed." in log


def test_a_port_that_is_taken_is_said(run: Path) -> None:
    with served(run) as address:
        port = address.split(":")[2].rstrip("/")
        result = sail("explore", run, "--port", port, expect=1)
    assert f"port {port} cannot be listened at" in result.stderr
    assert "--port" in result.stderr


def test_a_run_without_a_head_is_shown_as_far_as_it_is(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.toml", "index", "features"):
        (folder / name).symlink_to(run / name)
    app = create_app(Session(folder, device="cpu"), Access("127.0.0.1"))
    page = TestClient(app, base_url="http://127.0.0.1")
    facts = given(page, "/api/run")
    assert facts["head"] is None
    assert not facts["is_evaluated"]
    assert load_config(facts["run_file"], []).run.name == "tiny"
    assert len(given(page, "/api/rows", split="test", count=5)["rows"]) == 5
    assert given(page, "/api/training")["curves"] == {}
    assert given(page, "/api/store", split="test")["rows"] == 16
    assert "Train one with `sail align`" in refused(
        page, 409, "/api/search", split="test", text="a star"
    )
    assert "Run `sail eval`" in refused(page, 409, "/api/results")
    with pytest.raises(ConfigError, match=r"has no config\.toml"):
        Session(tmp_path)


COMPILER = next(Path(sys.prefix).glob("typescript-*/node_modules/typescript/bin/tsc"), None)


@pytest.mark.skipif(COMPILER is None, reason="there is no TypeScript in .venv (make check)")
def test_the_types_of_the_page_are_those_of_the_answers(page: TestClient, tmp_path: Path) -> None:
    asked: dict[str, dict[str, Any]] = {
        "/api/run": {},
        "/api/rows": {"split": "test"},
        "/api/shown": {"split": "test", "row": 1},
        "/api/row": {"split": "test", "row": BROKEN},
        "/api/search": {"split": "test", "text": "a star", "among": "captions"},
        "/api/similar": {"split": "test", "row": 1},
        "/api/map": {"split": "test"},
        "/api/results": {},
        "/api/results/classes": {"split": "test"},
        "/api/results/failures": {"name": "zero_shot test top1"},
        "/api/training": {},
        "/api/store": {"split": "test"},
        "/api/store/quarantine": {"split": "test", "column": "image/vit"},
        "/api/store/duplicates": {"split": "test", "column": "image/vit"},
    }
    served = {route.path for route in router.routes if isinstance(route, APIRoute)}
    assert {path for path in served if path.startswith("/api/")} == {*asked, "/api/map/points"}
    answers = {path: given(page, path, **parameters) for path, parameters in asked.items()}
    assert answers["/api/results/failures"]["rows"]
    seen = answers["/api/training"]["bytes"]
    unchanged = given(page, "/api/training", seen=seen)
    (tmp_path / "answers.ts").write_text(
        f"import type {{ Answers }} from {json.dumps(str(STATIC.with_name('answers.d.ts')))};\n"
        f"export const answers: Answers = {json.dumps(answers)};\n"
        f"export const unchanged: Answers['/api/training'] = {json.dumps(unchanged)};\n"
    )
    settings = {"extends": str(STATIC.with_name("jsconfig.json")), "include": ["answers.ts"]}
    (tmp_path / "tsconfig.json").write_text(json.dumps(settings))
    command = [str(Path(sys.prefix) / "bin" / "node"), str(COMPILER), "-p", str(tmp_path)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_modules_of_the_page_import_each_other_in_no_circle() -> None:
    imported = {
        path.name: re.findall(r'from "\./([^"]+)"', path.read_text(encoding="utf-8"))
        for path in STATIC.glob("*.js")
    }
    assert imported["app.js"]
    TopologicalSorter(imported).prepare()  # it raises where there is a circle
