"""Places, patterns and the operations on files, on local disk."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from features.errors import PlaceError
from features.storage import files
from features.storage.files import expanded, matching_places
from features.storage.parallel import IN_FLIGHT, in_order
from features.storage.place import RemotePath, as_place, without_secrets


def test_a_url_is_a_place_with_the_names_of_a_path() -> None:
    place = as_place("s3://bucket/data/train-0.tar")
    assert isinstance(place, RemotePath)
    assert (place.bucket, place.key) == ("bucket", "data/train-0.tar")
    assert (place.name, place.stem, place.suffix) == ("train-0.tar", "train-0", ".tar")
    assert str(place.parent / "x/y") == "s3://bucket/data/x/y"


def test_anything_without_a_scheme_is_a_local_path() -> None:
    assert as_place("data/train-0.tar") == Path("data/train-0.tar")


@pytest.mark.parametrize("url", ["ftp://host/x", "s3://", "s3:///x", "s3://b//x", "S3//x://y"])
def test_a_url_of_no_known_kind_is_refused_with_those_that_are(url: str) -> None:
    with pytest.raises(PlaceError, match=r"no place that can be read.* s3://, gs://, http://"):
        as_place(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://user:secret@host/x.tar",
        "https://user:p@secret@host/x.tar",
        "https://host/x.tar?X-Amz-Signature=secret",
        "s3://key:secret@bucket/x.tar",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(PlaceError, match="carries credentials or a query") as caught:
        as_place(url)
    assert "secret" not in str(caught.value)


def test_what_is_told_of_a_url_has_neither_user_nor_query() -> None:
    text = "GET https://user:secret@host/a?sig=secret failed; see 's3://b/c?.tar'"
    assert without_secrets(text) == "GET https://host/a failed; see 's3://b/c?.tar'"


def test_a_revision_on_the_hub_is_no_password() -> None:
    place = as_place("hf://datasets/owner/name@v1/x.tar")
    assert str(place) == "hf://datasets/owner/name@v1/x.tar"


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("x.tar", ["x.tar"]),
        ("x-{08..11}.tar", ["x-08.tar", "x-09.tar", "x-10.tar", "x-11.tar"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("{a}-{1...2}-{}", ["{a}-{1...2}-{}"]),
    ],
)
def test_braces_stand_for_numbers_and_words(pattern: str, names: list[str]) -> None:
    assert list(expanded(pattern)) == names


def test_a_name_that_braces_stand_for_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "x-0.tar").touch()
    (tmp_path / "x-2.tar").touch()
    with pytest.raises(FileNotFoundError, match=r"x-1\.tar"):
        matching_places(f"{tmp_path}/x-{{0..2}}.tar")


def test_folders_and_files_that_are_there_are_no_patterns(tmp_path: Path) -> None:
    folder = tmp_path / "2019 [1]*"
    folder.mkdir()
    for name in ("a[1].tar", "b1.tar", ".c1.tar"):
        (folder / name).touch()
    assert matching_places(f"{folder}/a[1].tar") == [folder / "a[1].tar"]
    assert matching_places(f"{folder}/b[1].tar") == [folder / "b1.tar"]
    assert matching_places(f"{tmp_path}/**/*1*.tar") == [folder / "a[1].tar", folder / "b1.tar"]


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    files.write(tmp_path / "folder" / "file", b"one")
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        files.write(tmp_path / "folder" / "file", b"two")
    assert (tmp_path / "folder" / "file").read_bytes() == b"one"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["file"]


def test_the_names_of_a_folder_are_sorted_and_none_where_there_is_none(tmp_path: Path) -> None:
    for name in ("b", "a"):
        files.write(tmp_path / name, b"")
    assert files.names(tmp_path) == ["a", "b"]
    assert files.names(tmp_path / "nothing") == []


def test_results_come_in_order_and_items_are_not_taken_far_ahead() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield number

    results = in_order(lambda number: number * 2, items(), at=RemotePath("s3", "bucket"))
    assert [next(results) for _ in range(3)] == [0, 2, 4]
    assert taken <= IN_FLIGHT + 3
    results.close()
