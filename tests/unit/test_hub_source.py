"""`kind = "hub"` finds the files of a split by the card, by their names, or as the hub has them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.errors import SourceError
from features.index import SampleReader, build_index
from features.sources import Counts, SourceReader
from features.storage.place import RemotePath
from tests import tiny
from tests.servers import HubServer, commit_of
from tests.source_suite import parsed

IMAGES = [tiny.encoded(tiny.picture(number)) for number in range(3)]
NAMES = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}


def write(folder: Path, *names: str) -> None:
    """Write files as Hugging Face datasets does: images as structs, labels with names."""
    table = pa.table(
        {
            "image": [{"bytes": image, "path": None} for image in IMAGES],
            "label": [0, 1, 1],
            "caption": ["one", "two", "three"],
        }
    ).replace_schema_metadata({"huggingface": json.dumps(NAMES)})
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / name)


def opened(**settings: Any) -> SourceReader[Any]:
    return parsed({"kind": "hub", "repository": "owner/name", **settings}).open()


def names(reader: SourceReader[Any]) -> list[str]:
    """The files of a source, as they are named in the repository."""
    return [str(place).partition("@")[2].partition("/")[2] for place in reader.files]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(
        tmp_path / "main",
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "data/test-00000-of-00001.parquet",
        "small/training/extra.parquet",
    )
    return tmp_path / "main"


@pytest.fixture
def card() -> dict[str, Any]:
    return {}


@pytest.fixture(autouse=True)
def _hub(
    folder: Path, card: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    branches = {"refs/convert/parquet": tmp_path / "converted", "old": tmp_path / "old"}
    with HubServer(folder, "owner/name", card=card, branches=branches) as server:
        server.reach(monkeypatch)
        yield


def test_the_files_of_a_split_follow_from_their_names(tmp_path: Path) -> None:
    reader = opened()
    assert names(reader) == [f"data/train-0000{n}-of-00002.parquet" for n in (0, 1)]
    assert all(f"@{commit_of('main')}/" in str(place) for place in reader.files)
    index = build_index(reader, tmp_path / "index.parquet")
    assert SampleReader(index).read(0, 6) == [*IMAGES, *IMAGES]
    assert index.class_names == ("cat", "dog")
    assert [sample.label for sample in index.samples()] == [0, 1, 1, 0, 1, 1]
    assert names(opened(split="test")) == ["data/test-00000-of-00001.parquet"]


def test_a_split_that_no_file_is_of_is_refused_with_the_files_that_are_there() -> None:
    with pytest.raises(SourceError, match=r"is of the split 'dev'; there are data/test-00000"):
        opened(split="dev")


CARD = {
    "configs": [
        {
            "config_name": "all",
            "data_files": [
                {"split": "train", "path": ["data/train-*", "small/**/*.parquet"]},
                {"split": "held", "path": "data/test-*"},
            ],
        },
        {"config_name": "small", "data_files": "small/training/extra.parquet"},
    ]
}


@pytest.mark.parametrize("card", [CARD])
def test_the_card_says_which_files_a_split_has() -> None:
    assert len(names(opened(config="all"))) == 3
    assert names(opened(config="all", split="held")) == ["data/test-00000-of-00001.parquet"]
    assert names(opened(config="small")) == ["small/training/extra.parquet"]
    with pytest.raises(SourceError, match=r"has several of `config`\. One of \['all', 'small'\]"):
        opened()
    with pytest.raises(SourceError, match=r"has no split 'test'\. One of \['held', 'train'\]"):
        opened(config="all", split="test")


def test_where_there_is_no_parquet_that_of_the_hub_is_read(tmp_path: Path, folder: Path) -> None:
    for file in folder.rglob("*.parquet"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(SourceError, match="has no parquet files, nor has the hub converted it"):
        opened()
    write(tmp_path / "converted", "default/train/0000.parquet", "default/test/0000.parquet")
    reader = opened(split="test")
    assert names(reader) == ["default/test/0000.parquet"]
    assert f"@{commit_of('refs/convert/parquet')}/" in str(next(iter(reader.files)))


def test_what_was_indexed_stays_at_its_commit(tmp_path: Path) -> None:
    write(tmp_path / "old", "data/train-0.parquet")
    first = opened(revision="old")
    assert names(first) == ["data/train-0.parquet"]
    again = parsed({"kind": "hub", "repository": "owner/name"}).open(first.files)
    assert again.files == first.files
    (file,) = again.files
    assert isinstance(file, RemotePath)
    assert len(list(again.samples(file, Counts()))) == 3


def test_what_the_hub_has_not_is_one_line() -> None:
    with pytest.raises(SourceError, match="The hub has no data set owner/other"):
        opened(repository="owner/other")
    with pytest.raises(SourceError, match="no data set owner/name at v9"):
        opened(revision="v9")
