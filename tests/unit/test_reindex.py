"""An index follows its source: what comes later is added, what is there stays as it is."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import TypeAdapter

from features.errors import SourceError
from features.index import Changes, Index, SampleReader, build_index, find_changes, update_index
from features.sources import Sample, Source
from features.sources.index_writer import ROWS_PER_GROUP
from tests import tiny


def parsed(**settings: Any) -> Source:
    source: Source = TypeAdapter(Source).validate_python(settings)
    return source


def shards(folder: Path, *names: str, **settings: Any) -> Source:
    """Shards of three samples each, and the source that they are."""
    for name in names:
        tiny.write_tar(folder / f"{name}.tar", tiny.samples(3, first=ord(name[0])))
    return parsed(kind="webdataset", path=str(folder / "**/*.tar"), **settings)


def built(source: Source, folder: Path) -> Index:
    return build_index(source.open(), folder / "index.parquet")


def changes(index: Index, source: Source) -> Changes:
    return find_changes(index, source.open(index.names))


def updated(index: Index, source: Source, *, append: bool = False) -> Index:
    reader = source.open(index.names)
    return update_index(index, reader, find_changes(index, reader), append=append)


def keys(index: Index) -> list[str]:
    found: list[str] = index.rows_between(0, index.rows, ("key",)).column("key").to_pylist()
    return found


def table_of(folder: Path, rows: list[dict[str, Any]]) -> Source:
    for number, row in enumerate(rows):
        path = folder / str(row["image"])
        if not path.exists():
            Image.new("L", (2, 2), number).save(path)
    lines = [json.dumps(row) for row in rows]
    (folder / "table.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return parsed(kind="folder", path=str(folder / "table.jsonl"))


def test_a_shard_that_changed_or_is_gone_is_refused_by_name(tmp_path: Path) -> None:
    source = shards(tmp_path, "b", "d")
    index, content = built(source, tmp_path), (tmp_path / "d.tar").read_bytes()
    for other in (content[:-512], content.replace(b"JFIF", b"JFIX", 1)):
        (tmp_path / "d.tar").write_bytes(other)
        with pytest.raises(SourceError, match=r"d\.tar has changed since it was indexed"):
            changes(index, source)
    (tmp_path / "b.tar").unlink()
    with pytest.raises(SourceError, match=r"b\.tar is gone"):
        changes(index, source)


def test_the_same_shards_with_other_times_are_no_change(tmp_path: Path) -> None:
    source = shards(tmp_path, "b", "d")
    index = built(source, tmp_path)
    os.utime(tmp_path / "d.tar", ns=(0, 0))
    assert not changes(index, source)


def as_written_earlier(index: Index) -> Index:
    """The index without what earlier builds did not remember of files."""
    for about in index.shards.values():
        del about["sha256_of_blocks"]
    return index


def test_shards_of_an_earlier_index_are_listed_again_where_their_times_changed(
    tmp_path: Path,
) -> None:
    source = shards(tmp_path, "b", "d")
    index = as_written_earlier(built(source, tmp_path))
    assert not changes(index, source)
    os.utime(tmp_path / "d.tar", ns=(0, 0))
    again = updated(index, source)
    assert keys(again) == keys(index)
    assert not changes(again, source)
    content = bytearray((tmp_path / "d.tar").read_bytes())
    content[content.index(b'"short": "') + len('"short": "')] ^= 1  # the size stays
    (tmp_path / "d.tar").write_bytes(content)
    with pytest.raises(SourceError, match=r"Row 3 of .* has caption/short"):
        updated(as_written_earlier(again), source)


def test_a_source_that_lies_elsewhere_as_a_whole_is_the_same(tmp_path: Path) -> None:
    source = shards(tmp_path / "old", "b", "d")
    index = built(source, tmp_path)
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    moved = parsed(kind="webdataset", path=str(tmp_path / "new/*.tar"))
    again = updated(index, moved)
    assert keys(again) == keys(index)
    assert [path.parent.name for path in again.shards] == ["new", "new"]
    assert SampleReader(again).read(0, 6) == SampleReader(index).read(0, 6)
    tiny.write_tar(tmp_path / "other" / "b.tar", tiny.samples(3, first=7))
    tiny.write_tar(tmp_path / "other" / "d.tar", tiny.samples(3, first=8))
    other = parsed(kind="webdataset", path=str(tmp_path / "other/*.tar"))
    with pytest.raises(SourceError, match="does not match it any more"):
        updated(again, other)


def test_a_shard_that_is_not_matched_any_more_is_refused_by_name(tmp_path: Path) -> None:
    index = built(shards(tmp_path, "b", "d"), tmp_path)
    narrowed = parsed(kind="webdataset", path=str(tmp_path / "b.tar"))
    with pytest.raises(SourceError, match=r"d\.tar was indexed .* does not match it any more"):
        changes(index, narrowed)


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    index = built(shards(tmp_path, "b"), tmp_path)
    with pytest.raises(SourceError, match="another source: its label was 'label' and is 'class'"):
        changes(index, shards(tmp_path, label="class"))


def test_further_shards_are_not_appended_unless_asked_for(tmp_path: Path) -> None:
    source = shards(tmp_path, "b", "d")
    index = built(source, tmp_path)
    shards(tmp_path, "e")
    with pytest.raises(
        SourceError, match=r"Files match .*: 1, of which .*e\.tar is the first.* --append"
    ):
        updated(index, source)
    assert Index.open(index.path).rows == 6


def test_further_shards_come_behind_the_rows_there_are_in_their_own_order(tmp_path: Path) -> None:
    source = shards(tmp_path, "b", "d")
    index = built(source, tmp_path)
    before = index.rows_between(0, 6)
    shards(tmp_path, "e", "c", "a")
    grown = updated(index, source, append=True)
    assert grown.rows_between(0, 6).equals(before)
    assert [key.split("/")[0] for key in keys(grown)[::3]] == ["b", "d", "a", "c", "e"]
    assert [path.stem for path in grown.shards] == ["b", "d", "a", "c", "e"]
    assert grown.grown_from == (6,)
    assert not changes(grown, source)
    shards(tmp_path, "A")
    again = updated(grown, source, append=True)
    assert keys(again)[:15] == keys(grown)
    assert again.grown_from == (6, 15)


def test_an_index_that_grew_is_that_of_the_same_files_in_the_same_order(tmp_path: Path) -> None:
    source = shards(tmp_path, "b", "d")
    index = built(source, tmp_path)
    shards(tmp_path, "e", "f")
    grown = updated(index, source, append=True)
    fresh = build_index(source.open(), tmp_path / "fresh.parquet")
    assert grown.rows_between(0, grown.rows).equals(fresh.rows_between(0, fresh.rows))
    assert grown.counts == fresh.counts
    assert grown.shards == fresh.shards
    assert fresh.grown_from == ()


def test_shards_are_not_read_again_where_only_others_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shards(tmp_path, "b", "d")
    index = built(source, tmp_path)
    shards(tmp_path, "e")
    opened: list[str] = []

    def listed(_shards: object, file: Path, _counts: object) -> Iterator[Sample]:
        opened.append(file.name)
        return iter(())

    monkeypatch.setattr("features.sources.webdataset.TarShards.samples", listed)
    updated(index, source, append=True)
    assert opened == ["e.tar"]


def test_rows_are_copied_across_the_groups_of_the_file(tmp_path: Path) -> None:
    members = [(f"{row:06d}.jpg", b"%d" % row) for row in range(ROWS_PER_GROUP + 5)]
    tiny.write_tar(tmp_path / "b.tar", members)
    source = shards(tmp_path)
    index = built(source, tmp_path)
    tiny.write_tar(tmp_path / "c.tar", members)
    grown = updated(index, source, append=True)
    fresh = build_index(source.open(), tmp_path / "fresh.parquet")
    assert keys(grown) == keys(fresh)
    assert pq.ParquetFile(grown.path).metadata.num_row_groups == 3


def test_a_path_with_further_patterns_appends_too(tmp_path: Path) -> None:
    shards(tmp_path, "m")
    index = built(parsed(kind="webdataset", path=str(tmp_path / "m*.tar")), tmp_path)
    shards(tmp_path, "a")
    wider = parsed(kind="webdataset", path=[str(tmp_path / "a*.tar"), str(tmp_path / "m*.tar")])
    grown = updated(index, wider, append=True)
    assert [key.split("/")[0] for key in keys(grown)[::3]] == ["m", "a"]
    assert grown.source == wider.recorded()


def test_a_name_that_is_taken_leaves_the_keys_there_are_and_gives_the_new_one_its_folder(
    tmp_path: Path,
) -> None:
    source = shards(tmp_path, "b")
    index = built(source, tmp_path)
    tiny.write_tar(tmp_path / "more" / "b.tar", tiny.samples(1))
    tiny.write_tar(tmp_path / "more" / "c.tar", tiny.samples(1))
    grown = updated(index, source, append=True)
    assert keys(grown) == [*keys(index), "more/b/00000", "more/c/00000"]


def test_a_name_within_that_of_another_shard_cannot_give_equal_keys(tmp_path: Path) -> None:
    tiny.write_tar(tmp_path / "b.tar", [("x/0.jpg", b"1"), ("y.jpg", b"2")])
    source = shards(tmp_path)
    index = built(source, tmp_path)
    tiny.write_tar(tmp_path / "b" / "b.tar", [("0.jpg", b"3")])
    tiny.write_tar(tmp_path / "b" / "x.tar", [("0.jpg", b"3")])
    grown = updated(index, source, append=True)
    assert len(set(keys(grown))) == grown.rows == 4
    assert keys(grown)[:2] == ["b/x/0", "b/y"]


def test_a_further_caption_field_is_taken_without_being_asked_twice(tmp_path: Path) -> None:
    index = built(shards(tmp_path, "b", captions=["short"]), tmp_path)
    before = index.rows_between(0, 3)
    wider = updated(index, shards(tmp_path, captions=["short", "long"]))
    assert wider.fields == ("long", "short")
    assert wider.rows_between(0, 3, tuple(before.column_names)).equals(before)
    assert wider.rows_between(1, 2).column("caption/long").to_pylist() == [
        tiny.caption(ord("b") + 1)
    ]
    assert wider.grown_from == ()


def test_a_caption_field_and_shards_can_come_at_once(tmp_path: Path) -> None:
    index = built(shards(tmp_path, "b", captions=["short"]), tmp_path)
    source = shards(tmp_path, "a", captions=["short", "long"])
    grown = updated(index, source, append=True)
    assert [key.split("/")[0] for key in keys(grown)[::3]] == ["b", "a"]
    assert grown.rows_between(0, 1).column("caption/long").to_pylist() == [tiny.caption(ord("b"))]


def test_a_caption_field_that_goes_is_refused_by_name(tmp_path: Path) -> None:
    index = built(shards(tmp_path, "b"), tmp_path)
    with pytest.raises(SourceError, match="captions under 'long', which the source no longer"):
        updated(index, shards(tmp_path, captions=["short"]))
    assert Index.open(index.path).fields == ("long", "short")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.tar", "index.parquet"]


def test_a_table_with_a_further_column_of_captions_is_taken(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"image": f"{i}.png", "short": f"s{i}"} for i in range(3)]
    index = built(table_of(tmp_path, rows), tmp_path)
    source = table_of(tmp_path, [row | {"long": f"l{row['short']}"} for row in rows])
    wider = updated(index, source)
    assert wider.fields == ("long", "short")
    assert not changes(wider, source)


def test_a_table_with_rows_at_its_end_is_appended_when_asked_for(tmp_path: Path) -> None:
    rows = [{"image": f"{i}.png", "caption": str(i)} for i in range(3)]
    index = built(table_of(tmp_path, rows[:2]), tmp_path)
    source = table_of(tmp_path, rows)
    with pytest.raises(SourceError, match=r"1 more rows than .*--append"):
        updated(index, source)
    assert updated(index, source, append=True).grown_from == (2,)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([1, 0, 2], r"Row 0 of .*'table/0', has key = 'table/0', but the source gives 'table/1'"),
        ([0, 1], "2 rows now, .* has 3"),
    ],
)
def test_a_table_whose_rows_moved_or_went_is_refused(
    rows: list[int], words: str, tmp_path: Path
) -> None:
    every = [{"image": f"{i}.png", "caption": str(i)} for i in range(3)]
    index = built(table_of(tmp_path, every), tmp_path)
    source = table_of(tmp_path, [every[row] for row in rows])
    with pytest.raises(SourceError, match=words):
        updated(index, source, append=True)


def test_a_table_with_another_caption_is_refused_with_both(tmp_path: Path) -> None:
    index = built(table_of(tmp_path, [{"image": "0.png", "caption": "a cat"}]), tmp_path)
    source = table_of(tmp_path, [{"image": "0.png", "caption": "a dog"}])
    with pytest.raises(
        SourceError, match="caption/caption = 'a cat', but the source gives 'a dog'"
    ):
        updated(index, source, append=True)


def test_more_of_the_rows_of_a_shard_are_appended_when_asked_for(tmp_path: Path) -> None:
    index = built(shards(tmp_path, "b", rows=2), tmp_path)
    assert index.rows == 2
    more = shards(tmp_path)
    with pytest.raises(SourceError, match="1 more rows"):
        updated(index, more)
    assert updated(index, more, append=True).rows == 3


def test_a_class_folder_that_comes_later_is_the_class_after_the_others(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("L", (2, 2)).save(tmp_path / name / "1.png")
    source = parsed(kind="classes", path=str(tmp_path))
    index = build_index(source.open(), tmp_path / "index.parquet")
    (tmp_path / "ant").mkdir()
    Image.new("L", (2, 2)).save(tmp_path / "ant" / "1.png")
    with pytest.raises(SourceError, match="ant is the first"):
        updated(index, source)
    grown = updated(index, source, append=True)
    assert grown.class_names == ("cat", "dog", "ant")
    table = grown.rows_between(0, 3)
    assert table.column("key").to_pylist() == ["cat/1", "dog/1", "ant/1"]
    assert table.column("label").to_pylist() == [0, 1, 2]


def test_class_names_that_are_not_those_there_were_are_refused(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(map(str, range(9))))
    source = shards(tmp_path, "b", class_names=str(names))
    index = built(source, tmp_path)
    shards(tmp_path, "c")
    names.write_text("\n".join(map(str, range(9, 0, -1))))
    with pytest.raises(SourceError, match="do not begin with the 9"):
        updated(index, source, append=True)


def test_a_killed_listing_leaves_the_index_there_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """Stands for SIGKILL."""

    def die(*_: object, **__: object) -> None:
        raise Killed

    source = shards(tmp_path, "b")
    index = built(source, tmp_path)
    shards(tmp_path, "c")
    with monkeypatch.context() as patch:
        patch.setattr("features.index._check_rows", die)
        with pytest.raises(Killed):
            updated(index, source, append=True)
    assert Index.open(index.path).rows == 3
    assert updated(index, source, append=True).rows == 6
