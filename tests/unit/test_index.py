"""The index: every sample has a row, and its image is read by place."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import TypeAdapter

from features.errors import SourceError
from features.images import decode
from features.index import Index, SampleReader, build_index
from features.sources import Source, parquet
from features.sources.index_writer import ROWS_PER_GROUP
from features.sources.webdataset import WebdatasetSource
from tests import tiny


def parsed(**settings: Any) -> Source:
    source: Source = TypeAdapter(Source).validate_python(settings)
    return source


def two_shards(path: Path) -> WebdatasetSource:
    for number in range(2):
        tiny.write_tar(path / f"s-{number}.tar", tiny.samples(5, first=5 * number))
    return WebdatasetSource(kind="webdataset", path=str(path / "s-*.tar"))


def many(path: Path, rows: int) -> WebdatasetSource:
    members = [(f"{row:06d}.jpg", b"%d" % row) for row in range(rows)]
    tiny.write_tar(path / "many.tar", members)
    return WebdatasetSource(kind="webdataset", path=str(path / "many.tar"))


def with_captions(path: Path, captions: list[list[str]]) -> WebdatasetSource:
    members: list[tuple[str, bytes]] = []
    for row, texts in enumerate(captions):
        members += [
            (f"{row}.jpg", b"image"),
            (f"{row}.json", json.dumps({"captions": texts}).encode()),
        ]
    tiny.write_tar(path / "c.tar", members)
    return WebdatasetSource(kind="webdataset", path=str(path / "c.tar"))


def test_every_sample_has_a_row_in_the_order_of_the_shards(tmp_path: Path) -> None:
    source = two_shards(tmp_path)
    index = Index.open(build_index(source.open(), tmp_path / "index.parquet").path)
    assert index.rows == 10
    assert index.fields == ("long", "short")
    assert index.has_labels
    assert index.has_groups
    assert index.class_names is None
    table = index.rows_between(4, 6)
    assert table.column("key").to_pylist() == ["s-0/00004", "s-1/00005"]
    assert table.column("caption/long").to_pylist() == [tiny.caption(4), tiny.caption(5)]
    assert table.column("label").to_pylist() == [4, 0]


def test_rows_are_read_across_the_groups_of_the_file(tmp_path: Path) -> None:
    rows = 2 * ROWS_PER_GROUP + 3
    index = build_index(many(tmp_path, rows).open(), tmp_path / "index.parquet")
    assert [table.num_rows for table in index.batches(5000)] == [5000, rows - 5000]
    start, stop = ROWS_PER_GROUP - 2, 2 * ROWS_PER_GROUP + 1
    keys = index.rows_between(start, stop, ("key",)).column("key").to_pylist()
    assert keys == [f"many/{row:06d}" for row in range(start, stop)]
    assert index.rows_between(rows, rows).num_rows == 0
    with pytest.raises(IndexError):
        index.rows_between(0, rows + 1)


def test_parts_of_images_are_cut_out_as_pillow_crops_them(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(tiny.encoded(tiny.picture(0)))
    (tmp_path / "torn.jpg").write_bytes(tiny.encoded(tiny.picture(1))[:200])
    boxes = [("a.jpg", (2, 3, 10, 8)), ("a.jpg", (20, 5, 9, 30)), ("torn.jpg", (0, 0, 5, 5))]
    examples = [
        {"image_path": name, "true_caption": "a", "false_caption": "b"}
        | {f"bbox_{side}": value for side, value in zip("xywh", box, strict=True)}
        for name, box in boxes
    ]
    path = tmp_path / "visual_genome_relation.json"
    path.write_text(json.dumps(examples))
    source = parsed(kind="annotations", format="aro", path=str(path))
    index = build_index(source.open(), tmp_path / "index.parquet")
    *parts, torn = SampleReader(index).read(0, 3)
    with Image.open(tmp_path / "a.jpg") as whole:
        for part, (_, (x, y, width, height)) in zip(parts, boxes, strict=False):
            wanted = whole.convert("RGB").crop((x, y, x + width, y + height))
            np.testing.assert_array_equal(decode(part or b"", max_pixels=1000), wanted)
    assert torn == (tmp_path / "torn.jpg").read_bytes()  # whoever decodes it says what is wrong
    content = (tmp_path / "a.jpg").read_bytes()
    assert SampleReader(index, max_pixels=100).read_row(0) == content
    assert [sample.box for sample in index.samples()][1] == [20, 5, 29, 35]
    assert "box" not in build_index(two_shards(tmp_path).open(), tmp_path / "other.parquet").columns


def test_threads_may_share_a_reader(tmp_path: Path) -> None:
    rows = ROWS_PER_GROUP + 100
    reader = SampleReader(build_index(many(tmp_path, rows).open(), tmp_path / "index.parquet"))
    starts = list(range(0, rows, 97))
    with ThreadPoolExecutor(8) as pool:
        batches = pool.map(lambda start: reader.read(start, min(start + 97, rows)), starts)
        images = [image for batch in batches for image in batch]
    assert images == [b"%d" % row for row in range(rows)]


def test_images_in_parquet_are_read_once_where_their_rows_come_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [{"bytes": b"%d" % row, "path": None} if row % 5 else None for row in range(40)]
    pq.write_table(pa.table({"image": images}), tmp_path / "p.parquet", row_group_size=8)
    source = parsed(kind="parquet", path=str(tmp_path / "p.parquet"))
    index = build_index(source.open(), tmp_path / "index.parquet")
    begun: list[int] = []

    def counted(path: str, column: str, group: int, first: int) -> Iterator[Any]:
        begun.append(group)
        return batches(path, column, group, first)

    batches = parquet._batches
    monkeypatch.setattr(parquet, "_batches", counted)
    monkeypatch.setattr(parquet, "IMAGES_AT_ONCE", 2)
    monkeypatch.setattr(parquet, "BATCHES_KEPT", 2)
    reader = SampleReader(index)
    found = [image for start in range(0, 40, 4) for image in reader.read(start, start + 4)]
    assert found == [image["bytes"] if image else None for image in images]
    assert begun == [0]  # the file is read on from where it was left
    assert reader.read(17, 18) == [b"17"]
    assert begun == [0, 2]  # back, from the beginning of the row group


def test_a_row_that_lacks_a_caption_has_an_empty_one_and_is_counted(tmp_path: Path) -> None:
    source = with_captions(tmp_path, [["a", "b"], ["c"], [" ", "d"]])
    index = build_index(source.open(), tmp_path / "index.parquet")
    assert index.fields == ("0", "1")
    assert index.rows_between(1, 2).column("caption/1").to_pylist() == [""]
    assert index.counts["rows without caption '0'"] == 1
    assert index.counts["rows without caption '1'"] == 1


def test_a_late_sample_with_more_captions_adds_fields_to_all(tmp_path: Path) -> None:
    captions = [["a"]] * (ROWS_PER_GROUP + 1) + [["a", "b"], ["a", "b", "c"]]
    progress: list[int] = []
    index = build_index(
        with_captions(tmp_path, captions).open(),
        tmp_path / "index.parquet",
        on_progress=progress.append,
    )
    assert index.fields == ("0", "1", "2")
    assert index.rows_between(index.rows - 1, index.rows).column("caption/2").to_pylist() == ["c"]
    assert sum(progress) == index.rows == len(captions)


@pytest.mark.parametrize("before", [0, ROWS_PER_GROUP])
def test_more_caption_fields_than_make_sense_are_refused(tmp_path: Path, before: int) -> None:
    source = with_captions(tmp_path, [["a"]] * before + [["a"] * 300])
    with pytest.raises(SourceError, match="more than 256 caption fields"):
        build_index(source.open(), tmp_path / "index.parquet")


def test_labels_beyond_the_class_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("one\ntwo\nthree\n")
    source = two_shards(tmp_path).model_copy(update={"class_names": tmp_path / "names.txt"})
    with pytest.raises(SourceError, match=r"has label 4, but .* names only 3 classes"):
        build_index(source.open(), tmp_path / "index.parquet")
    assert not (tmp_path / "index.parquet").exists()


def test_a_source_without_samples_says_what_was_there(tmp_path: Path) -> None:
    tiny.write_tar(tmp_path / "s.tar", [("README", b"?")])
    source = parsed(kind="webdataset", path=str(tmp_path / "s.tar"))
    with pytest.raises(SourceError, match=r"holds no samples \(members that are no plain file"):
        build_index(source.open(), tmp_path / "index.parquet")


def test_a_file_name_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    (folder / os.fsdecode(b"\xff.jpg")).write_bytes(b"image")
    with pytest.raises(SourceError, match=r"cannot be written as text: .*a/\\\\?udcff"):
        build_index(parsed(kind="classes", path=tmp_path / "images").open(), tmp_path / "i.parquet")
