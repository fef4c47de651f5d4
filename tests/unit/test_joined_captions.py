"""Captions from tables are joined to the samples of tars and folders, or refused in one line."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from features.errors import SourceError
from features.index import Index, build_index, find_changes, update_index
from tests import tiny
from tests.source_suite import IMAGES, parsed

DREAMLIP = ("raw_caption", "shortIB_captions", "longIB_captions", "shortSV_captions")
Rows = Sequence[Mapping[str, str]]


def built(folder: Path, **settings: Any) -> Index:
    return build_index(parsed(settings).open(), folder / "index.parquet", needs_images=True)


def captions_of(index: Index) -> list[dict[str, str]]:
    return [{name: text for name, text in row.captions.items() if text} for row in index.samples()]


def shard(folder: Path, name: str = "00000", first: int = 0) -> Path:
    """Three samples as img2dataset writes them."""
    members = []
    for i in range(first, first + 3):
        about = {"url": f"https://x.org/{i}", "caption": f"old {i}", "uid": f"u{i}"}
        key = f"{name}{i:04d}"
        members += [(f"{key}.jpg", IMAGES[0]), (f"{key}.txt", about["caption"].encode())]
        members.append((f"{key}.json", json.dumps(about | {"key": key}).encode()))
    return tiny.write_tar(folder / f"{name}.tar", members)


def webdataset(folder: Path, **settings: Any) -> Index:
    path = shard(folder)
    return built(folder, kind="webdataset", path=path, **settings)


def table(folder: Path, text: str, name: str = "t.csv") -> Path:
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize(
    ("ids", "join"),
    [
        (["https://x.org/0", "https://x.org/2", "https://x.org/9"], {}),
        (["000000000", "000000002", "000000009"], {}),
        (["00000/000000000", "00000/000000002", "x"], {}),
        (["u0", "u2", "u9"], {"join": "uid"}),
    ],
)
def test_captions_are_joined_by_url_or_key_and_what_is_left_is_named(
    tmp_path: Path, ids: list[str], join: dict[str, str]
) -> None:
    name = join.get("join", "Image Path")
    lines = [f"{each},new {i},s {i},0.{i}" for i, each in enumerate([*ids, ids[0]])]
    given = table(tmp_path, "\n".join([f"{name},longSV,shortSV,similarity", *lines]))
    index = webdataset(tmp_path, table=given, captions=["caption", "longSV", "shortSV"], **join)
    assert captions_of(index) == [
        {"caption": "old 0", "longSV": "new 0", "shortSV": "s 0"},
        {"caption": "old 1"},
        {"caption": "old 2", "longSV": "new 1", "shortSV": "s 1"},
    ]
    counts = index.counts
    assert counts["samples without a row in t.csv: '00000/000000001'"] == 1
    assert counts[f"rows of t.csv that are of no sample: {ids[2]!r}"] == 1
    assert counts[f"rows of t.csv whose id came before (ignored): {ids[0]!r}"] == 1
    named = webdataset(tmp_path, table=given, captions=["shortSV"], **join)
    assert captions_of(named) == [{"shortSV": "s 0"}, {}, {"shortSV": "s 1"}]
    beside = webdataset(tmp_path, table=given, **join)
    assert set(beside.fields) == {"caption", "txt", "longSV", "shortSV"}


def as_parquet(rows: Rows) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), buffer)
    return buffer.getvalue()


def as_text(rows: Rows, separator: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


WRITERS: dict[str, Callable[[Rows], bytes]] = {
    "d.csv": lambda rows: as_text(rows, ","),
    "d.tsv": lambda rows: as_text(rows, "\t"),
    "d.jsonl": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
    "d.parquet": as_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_captions_may_name_the_table_of_dreamlip(tmp_path: Path, name: str) -> None:
    rows = [
        {"Image Path": f"https://x.org/{i}"} | {each: f"{each}, {i}" for each in DREAMLIP}
        for i in range(3)
    ]
    (tmp_path / name).write_bytes(WRITERS[name](rows))
    index = webdataset(tmp_path, captions=str(tmp_path / name))
    assert captions_of(index) == [{each: row[each] for each in DREAMLIP} for row in rows]


def test_tables_of_several_sets_become_one_store(tmp_path: Path) -> None:
    shard(tmp_path), shard(tmp_path, "00001", first=3)
    first = table(tmp_path, "url,long\n" + "".join(f"https://x.org/{i},a{i}\n" for i in range(3)))
    second = table(
        tmp_path, "key,long\n" + "".join(f"00001{i:04d},b{i}\n" for i in (3, 4, 5)), "u.csv"
    )
    index = built(
        tmp_path,
        kind="webdataset",
        path=str(tmp_path / "*.tar"),
        captions=[str(first), str(second)],
    )
    assert [each["long"] for each in captions_of(index)] == ["a0", "a1", "a2", "b3", "b4", "b5"]
    assert not [count for name, count in index.counts.items() if "row" in name and count]


@pytest.mark.parametrize("form", ["{}.jpg", "{}", "sub/{}.jpg", "sub/{}"])
def test_captions_of_a_folder_are_joined_by_file_name(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "pictures" / "sub"
    folder.mkdir(parents=True)
    for name in ("p0", "p1"):
        (folder / f"{name}.jpg").write_bytes(IMAGES[0])
    given = table(folder.parent, f"image,long\n{form.format('p1')},new\n{form.format('p9')},no\n")
    index = built(tmp_path, kind="folder", path=folder.parent, captions=str(given))
    assert captions_of(index) == [{}, {"long": "new"}]
    assert index.counts["samples without a row in t.csv: 'pictures/sub/p0'"] == 1
    listed = table(tmp_path, "image,caption\nsub/p0.jpg,a\nsub/p1.jpg,b\n", "list.csv")
    index = built(tmp_path, kind="folder", path=listed, images=folder.parent, table=str(given))
    assert captions_of(index) == [{"caption": "a"}, {"caption": "b", "long": "new"}]


def test_lists_and_optional_columns_are_fields(tmp_path: Path) -> None:
    rows = [
        {"key": "000000000", "captions": ["a", "b"]},
        {"key": "000000001", "captions": ["c"], "long": "l"},
    ]
    given = table(tmp_path, "\n".join(map(json.dumps, rows)), "t.jsonl")
    assert captions_of(webdataset(tmp_path, captions=str(given))) == [
        {"0": "a", "1": "b"},
        {"0": "c", "long": "l"},
        {},
    ]


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("url,caption\nx,new\n", {"join": "uid"}, r"columns \['url', 'caption'\]\. 'uid', which"),
        ("who,caption\nx,new\n", {}, r"columns \['who', 'caption'\], and it is not clear which"),
        (
            "url,key,long\nx,y,new\n",
            {},
            r"\['url', 'key', 'long'\].* \(url, key may\)\. Set `join`",
        ),
        ("url,caption\n", {}, "has no rows"),
        (
            "url,caption\nhttps://y.org/0,new\n",
            {},
            r"no sample of .*'https://y.org/0', …, and a samp",
        ),
        ("url,score\nhttps://x.org/0,0.5\n", {}, r"holds no captions: its columns .*\['score'\]"),
        ("url,long\nhttps://x.org/0,new\n", {"captions": "short"}, r"under 'short'\. .*'long'\]"),
    ],
)
def test_what_cannot_be_joined_is_refused_in_one_line(
    tmp_path: Path, text: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SourceError, match=message) as refused:
        webdataset(tmp_path, table=table(tmp_path, text), **settings)
    assert "\n" not in str(refused.value)


def test_a_missing_table_and_settings_without_effect_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"There is no table .*none\.csv\. .* Correct `table`"):
        webdataset(tmp_path, captions=str(tmp_path / "none.csv"))
    for settings in ({"captions": ["a.csv", "long"]}, {"captions": "a.csv", "table": "b.csv"}):
        with pytest.raises(ValidationError, match=r"names the table 'a\.csv' beside"):
            webdataset(tmp_path, **settings)
    with pytest.raises(ValidationError, match="`join` has no effect without `table`"):
        webdataset(tmp_path, join="url")


def test_further_tars_count_the_rows_of_the_table_anew(tmp_path: Path) -> None:
    lines = "".join(f"https://x.org/{i},new {i}\n" for i in range(7))
    given = table(tmp_path, "url,long\n" + lines)
    settings = {"kind": "webdataset", "path": str(tmp_path / "*.tar"), "captions": str(given)}
    shard(tmp_path)
    index = built(tmp_path, **settings)
    unused = "rows of t.csv that are of no sample: 'https://x.org/{}'"
    first = unused.format("3', 'https://x.org/4', 'https://x.org/5") + ", …"
    assert index.counts[first] == 4
    shard(tmp_path, "00001", first=3)
    reader = parsed(settings).open(index.names)
    index = update_index(index, reader, find_changes(index, reader), append=True)
    assert [each["long"] for each in captions_of(index)] == [f"new {i}" for i in range(6)]
    assert index.counts[unused.format(6)] == 1
    assert first not in index.counts


def test_fields_of_the_table_are_known_where_the_first_samples_have_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("features.sources.index_writer.ROWS_PER_GROUP", 1)
    monkeypatch.setattr("features.index.ROWS_PER_GROUP", 1)
    monkeypatch.setattr("features.sources.index_writer.survey", None)  # a call is a TypeError
    given = table(tmp_path, "url,long\nhttps://x.org/2,new\n")
    assert captions_of(webdataset(tmp_path, captions=str(given))) == [{}, {}, {"long": "new"}]


def test_samples_that_are_listed_twice_are_counted_once(tmp_path: Path) -> None:
    members = []
    for i in range(3):
        record = json.dumps({"url": f"https://x.org/{i % 2}", "label": "cat"})  # a name: two passes
        members += [(f"{i}.jpg", IMAGES[0]), (f"{i}.json", record.encode())]
    tar = tiny.write_tar(tmp_path / "named.tar", members)
    given = table(tmp_path, "url,long\nhttps://x.org/0,new\n")
    index = built(tmp_path, kind="webdataset", path=tar, captions=str(given))
    assert index.class_names == ("cat",)
    assert index.counts["samples without a row in t.csv: 'named/1'"] == 1
    shared = "rows of t.csv that are of several samples (each has the captions)"
    assert index.counts[shared] == 1
