"""Tables, parquet files and folders as other programs write them: read, or refused."""

import base64
import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from features.errors import SourceError
from features.index import Index, SampleReader, build_index
from features.sources import Source
from tests import tiny

JPEGS = [tiny.encoded(tiny.picture(number)) for number in range(3)]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    for number, jpeg in enumerate(JPEGS):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg)
    return tmp_path


def index_of(here: Path, **settings: Any) -> Index:
    settings = {name: str(value) for name, value in settings.items()}
    source: Source = TypeAdapter(Source).validate_python(settings)
    return build_index(source.open(), here / "index.parquet")


def captions_of(index: Index) -> list[dict[str, str]]:
    return [sample.captions for sample in index.samples()]


def written(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


ONE = {"caption": "a dog"}
TWO = {"0": "a dog", "1": "a cat"}


@pytest.mark.parametrize(
    ("name", "text", "captions"),
    [
        ("bars.csv", "image| caption\n0.jpg| a dog\n", ONE),
        ("image_name.csv", "image_name,caption\n0.jpg,a dog\n", ONE),
        ("site.csv", "image,caption\n/0.jpg,a dog\n", ONE),
        ("records.jsonl", '{"image": "0.jpg", "captions": [{"raw": "a dog"}, "a cat"]}', TWO),
        ("record.jsonl", '{"image": "0.jpg", "caption": {"raw": "a dog", "id": 3}}', ONE),
        ("by-name.json", '{"0.jpg": "a dog"}', ONE),
        ("lists-by-name.json", '{"0.jpg": ["a dog", "a cat"]}', TWO),
        ("wrapped.json", '{"version": 1, "data": [{"image": "0.jpg", "caption": "a dog"}]}', ONE),
        ("indented.json", json.dumps({"image": "0.jpg", "caption": "a dog"}, indent=1), ONE),
        (
            "languages.jsonl",
            '{"image": "0.jpg", "caption": {"en": "a dog", "de": "ein Hund"}}',
            {"caption.de": "ein Hund", "caption.en": "a dog"},
        ),
    ],
)
def test_tables_of_other_programs(
    here: Path, name: str, text: str, captions: dict[str, str]
) -> None:
    index = index_of(here, kind="folder", path=written(here / name, text))
    assert captions_of(index) == [captions]
    assert SampleReader(index).read(0, 1) == JPEGS[:1]


def test_a_table_in_gzip(here: Path) -> None:
    path = here / "captions.csv.gz"
    path.write_bytes(gzip.compress(b"image,caption\n0.jpg,a dog\n"))
    assert captions_of(index_of(here, kind="folder", path=path)) == [ONE]
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(SourceError, match=r"captions\.csv\.gz cannot be read"):
        index_of(here, kind="folder", path=path)


def test_a_table_without_a_line_of_names_is_refused_by_that_line(here: Path) -> None:
    path = written(here / "bare.csv", "0.jpg,a dog\n1.jpg,a cat\n")
    with pytest.raises(SourceError, match=r"names no columns, but a picture: .* image,caption"):
        index_of(here, kind="folder", path=path)


@pytest.mark.parametrize(
    ("written_as", "labels"), [("1,0", [1, 0]), ("1.0", [1, 0]), ("1", [1, 0])]
)
def test_whole_numbers_with_the_decimal_comma_of_a_spreadsheet(
    here: Path, written_as: str, labels: list[int]
) -> None:
    rows = [f"0.jpg;a;{written_as}", f"1.jpg;b;{written_as.replace('1', '0', 1)}"]
    path = written(here / "t.csv", "\n".join(["image;caption;label", *rows]))
    index = index_of(here, kind="folder", path=path)
    assert [sample.label for sample in index.samples()] == labels
    assert index.class_names is None


def test_parquet_with_base64_and_with_texts_in_records(here: Path) -> None:
    table = pa.table(
        {
            "image": [base64.b64encode(jpeg).decode() for jpeg in JPEGS[:2]] + ["/9j/no base64"],
            "caption": pa.array(
                [[("en", "a")], [("en", "b")], []], pa.map_(pa.string(), pa.string())
            ),
        }
    )
    pq.write_table(table, here / "t.parquet")
    index = index_of(here, kind="parquet", path=here / "t.parquet")
    assert captions_of(index) == [{"caption.en": each} for each in ("a", "b", "")]
    images = SampleReader(index).read(0, 3)
    assert images[:2] == JPEGS[:2]
    assert images[2] == b"no base64"  # quarantined when it is decoded
    with pytest.raises(SourceError, match=r"'img'; it has .* Correct `image`"):
        index_of(here, kind="parquet", path=here / "t.parquet", image="img")


def test_a_column_of_another_name_that_holds_bytes_is_named(here: Path) -> None:
    pq.write_table(pa.table({"jpg": JPEGS, "caption": list("abc")}), here / "t.parquet")
    with pytest.raises(SourceError, match=r"no column 'image'; .* 'jpg' holds bytes\. Correct"):
        index_of(here, kind="parquet", path=here / "t.parquet")


def test_texts_beside_pictures_in_capitals_and_in_tars(here: Path) -> None:
    written(here / "0.TXT", "a dog")
    written(here / "1.Caption", "a cat")
    captions = captions_of(index_of(here, kind="folder", path=here))
    assert captions == [{"txt": "a dog"}, {"txt": "a cat"}, {"txt": ""}]
    with tarfile.open(here / "t.tar", "w") as tar:
        for name, content in (("0.jpg", JPEGS[0]), ("0.caption", b"a dog")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert captions_of(index_of(here, kind="webdataset", path=here / "t.tar")) == [ONE]


def test_folders_of_classes_one_below_are_named(here: Path) -> None:
    place = here / "set" / "train" / "cat"
    place.mkdir(parents=True)
    (place / "0.jpg").write_bytes(JPEGS[0])
    with pytest.raises(SourceError, match=r"in .*/set/train there are such folders"):
        index_of(here, kind="classes", path=here / "set")


def test_annotations_without_captions(here: Path) -> None:
    images = [{"id": 0, "file_name": "0.jpg"}]
    boxes = [{"image_id": 0, "bbox": [1, 2, 3, 4]}]
    named = {"kind": "annotations", "format": "coco", "path": here / "c.json"}
    captions = [{"image_id": 0, "caption": "a dog"}]
    written(here / "c.json", json.dumps({"images": images, "annotations": boxes + captions}))
    assert captions_of(index_of(here, **named)) == [{"0": "a dog"}]
    written(here / "c.json", json.dumps({"images": images, "annotations": boxes}))
    with pytest.raises(SourceError, match="none of its annotations is a caption"):
        index_of(here, **named)
