"""Inputs as people have them: each is read right, or refused in one line with what to do."""

import ast
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import BaseModel, ValidationError

from evaluate.measures import MEASURES
from features.errors import SourceError
from features.index import Index, SampleReader, build_index
from features.sources import SOURCES
from features.sources.base import IMAGE_SUFFIXES
from features.sources.text import decoded, lines_of, listed_texts
from features.status import Status
from pipeline.run.config import RunConfig
from tests import tiny
from tests.source_suite import IMAGES, parsed

IMAGE = IMAGES[0]
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("features", "align", "evaluate", "pipeline")


def built(folder: Path, **settings: Any) -> Index:
    return build_index(parsed(settings).open(), folder / "index.parquet", needs_images=True)


def rows_of(index: Index, *names: str) -> list[tuple[Any, ...]]:
    table = index.rows_between(0, index.rows)
    return list(zip(*(table.column(name).to_pylist() for name in names), strict=True))


def captions_of(index: Index) -> list[dict[str, str]]:
    return [{name: text for name, text in row.captions.items() if text} for row in index.samples()]


def table(folder: Path, text: str | bytes, name: str = "t.csv", **settings: Any) -> Index:
    """The index of a table of the pictures 0.jpg and 1.jpg."""
    for number in range(2):
        (folder / f"{number}.jpg").write_bytes(IMAGES[number])
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return built(folder, kind="folder", path=folder / name, **settings)


A_B = [{"caption": "a"}, {"caption": "b"}]
UMLAUTS = [{"caption": "grün"}, {"caption": "’n Haus"}]
UMLAUT_TABLE = "image,caption\n0.jpg,grün\n1.jpg,’n Haus\n"


@pytest.mark.parametrize(
    ("text", "captions"),
    [
        ("image, caption\n0.jpg, a\n1.jpg, b\n", A_B),
        ('image, caption\n0.jpg, "a"\n1.jpg, "b"\n', A_B),
        ("image ,caption \n0.jpg,a\n1.jpg,b\n", A_B),
        ("Image,Caption\n0.jpg,a\n1.jpg,b\n", A_B),
        ("file_name;CAPTION\n0.jpg;a\n1.jpg;b\n", A_B),
        ("image,caption\n0.jpg,a\n1.jpg,b\n,,\n,\n\n", A_B),
        ("sep=;\r\nimage;caption\r\n0.jpg;a\r\n1.jpg;b\r\n", A_B),
        ("sep=|\nimage|caption\n0.jpg|a\n1.jpg|b\n", A_B),
        ("image,caption\n 0.jpg,a\n1.jpg ,b\n", A_B),
        ("image,caption,,\n0.jpg,a,,\n1.jpg,b,,\n,,,\n", A_B),
        ("image,caption\n0.jpg,a\n\n , \n1.jpg,b\n", A_B),
        (f"image,caption\n0.jpg,{'a' * 200_000}\n", [{"caption": "a" * 200_000}]),
        ("image,caption\n0.jpg,\u2028a\u2028b\n", [{"caption": "\u2028a\u2028b"}]),
        ("image,captions\n0.jpg,\"['a', 'b']\"\n", [{"0": "a", "1": "b"}]),
        ('image,captions\n0.jpg,"[""a"", ""b""]"\n', [{"0": "a", "1": "b"}]),
        ("image,captions\n0.jpg,\"['a' 'b']\"\n", [{"0": "a", "1": "b"}]),
        ("image,captions\n0.jpg,[a red circle]\n", [{"captions": "[a red circle]"}]),
        ("image,caption\n1.jpg,b\n0.jpg,a\n1.jpg,c\n", [{"0": "b", "1": "c"}, {"0": "a"}]),
        ("image,caption\n1.jpg,b\n0.jpg,a\n1.jpg,b\n", [{"caption": "b"}, {"caption": "a"}]),
    ],
)
def test_a_table_as_it_is(tmp_path: Path, text: str, captions: list[dict[str, str]]) -> None:
    assert captions_of(table(tmp_path, text)) == captions


def test_where_no_column_is_a_caption_the_index_says_which_there_are(tmp_path: Path) -> None:
    index = table(tmp_path, "image,title,text\n0.jpg,a,b\n")
    assert (index.fields, index.seen) == ((), ("image", "title", "text"))
    assert table(tmp_path, "image,caption\n0.jpg,a\n").seen == ()


def test_a_list_written_as_text_is_one_in_every_kind_of_source(tmp_path: Path) -> None:
    text = "['a', 'b']"
    row = json.dumps({"image": "0.jpg", "captions": text})
    assert captions_of(table(tmp_path, row, "t.jsonl")) == [{"0": "a", "1": "b"}]
    members = ("1.jpg", IMAGE), ("1.json", json.dumps({"captions": text}))
    assert captions_of(shard(tmp_path, *members)) == [{"0": "a", "1": "b"}]
    pq.write_table(pa.table({"image": [IMAGE], "captions": [text]}), tmp_path / "p.parquet")
    index = built(tmp_path, kind="parquet", path=tmp_path / "p.parquet")
    assert captions_of(index) == [{"0": "a", "1": "b"}]


@pytest.mark.parametrize(
    ("name", "content", "encoding"),
    [
        ("t.csv", UMLAUT_TABLE.encode("cp1252"), "cp1252"),
        ("t.csv", UMLAUT_TABLE.encode("utf-16"), None),
        ("t.txt", UMLAUT_TABLE.replace(",", "\t").encode("utf-16"), None),  # Excel's Unicode text
        ("t.csv", b"\xef\xbb\xbf" + UMLAUT_TABLE.encode(), "cp1252"),
        ("t.csv", UMLAUT_TABLE.replace("\n", "\r\n").encode("utf-8-sig"), None),
        ("t.jsonl", '{"image": "0.jpg", "caption": "grün"}\n'.encode("cp1252"), "cp1252"),
    ],
)
def test_a_table_in_the_encoding_of_its_mark_or_of_the_settings(
    tmp_path: Path, name: str, content: bytes, encoding: str | None
) -> None:
    given = {} if encoding is None else {"encoding": encoding}
    found = captions_of(table(tmp_path, content, name, **given))
    assert found == UMLAUTS[: len(found)]


def test_a_table_in_another_encoding_is_refused_with_the_setting(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="Set `encoding` of the source"):
        table(tmp_path, UMLAUT_TABLE.encode("cp1252"))
    with pytest.raises(ValidationError, match="there is no encoding 'cp99'"):
        table(tmp_path, UMLAUT_TABLE, encoding="cp99")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.json", '[{"image": "0.jpg", "caption": "a"}, {"image": "1.jpg", "caption": "b"}]'),
        ("t.json", '{"image": "0.jpg", "caption": "a"}\n{"image": "1.jpg", "caption": "b"}'),
        ("t.ndjson", '{"image": "0.jpg", "caption": "a"}\n{"image": "1.jpg", "caption": "b"}'),
        ("captions.txt", "image,caption\n0.jpg,a\n1.jpg,b\n"),
    ],
)
def test_tables_under_other_names(tmp_path: Path, name: str, text: str) -> None:
    assert captions_of(table(tmp_path, text, name)) == A_B


@pytest.mark.parametrize(
    ("values", "labels", "names"),
    [
        (["0.0", "1.0", ""], [0, 1, -1], None),
        (["0", "NaN", "2"], [0, -1, 2], None),
        (["cat", "dog", "cat"], [0, 1, 0], ("cat", "dog")),
        (["dog", "", "cat"], [1, -1, 0], ("cat", "dog")),
        (["1_12", "11_2", "1_12"], [1, 0, 1], ("11_2", "1_12")),
        (["A", "7", "b"], [1, 0, 2], ("7", "A", "b")),
        (["2.75", "1", "-5"], [-1, 1, -1], None),
        (["n02084071", "n02121808", "n02084071"], [0, 1, 0], ("n02084071", "n02121808")),
    ],
)
def test_labels_are_whole_numbers_or_names(
    tmp_path: Path, values: list[str], labels: list[int], names: tuple[str, ...] | None
) -> None:
    members = [(f"{i}.jpg", IMAGE) for i in range(3)]
    members += [
        (f"{i}.json", json.dumps({"label": value}).encode()) for i, value in enumerate(values)
    ]
    tiny.write_tar(tmp_path / "s.tar", sorted(members))
    index = built(tmp_path, kind="webdataset", path=tmp_path / "s.tar")
    assert [label for (label,) in rows_of(index, "label")] == labels
    assert index.class_names == names


def test_labels_by_name_are_found_among_the_class_names_that_are_given(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("Dog\nCat\n")
    text = "image,caption,label\n0.jpg,a,cat\n1.jpg,b,dog\n"
    index = table(tmp_path, text, class_names=tmp_path / "names.txt")
    assert rows_of(index, "label") == [(1,), (0,)]
    assert index.class_names == ("Dog", "Cat")
    with pytest.raises(SourceError, match=r"1 labels .* are none of the 2 class names .*'cow'"):
        table(tmp_path, text.replace("dog", "cow"), class_names=tmp_path / "names.txt")


@pytest.mark.parametrize(
    ("values", "groups"),
    [
        (["1_12", "11_2"], [0, 1]),
        (["7", "7.0"], [7, 7]),
        (["x", "7"], [0, 1]),
        (["x", "x"], [0, 0]),
    ],
)
def test_groups_are_whole_numbers_or_names(
    tmp_path: Path, values: list[str], groups: list[int]
) -> None:
    lines = [f"{i}.jpg,a,{value}" for i, value in enumerate(values)]
    index = table(tmp_path, "\n".join(["image,caption,group", *lines]))
    assert [group for (group,) in rows_of(index, "group")] == groups


@pytest.mark.parametrize(
    ("there", "named"),
    [
        ("img/0.jpg", "img\\0.jpg"),
        ("img/0.JPG", "IMG/0.jpg"),
        ("img/0.jpg", "img/0"),
        (unicodedata.normalize("NFD", "img/é.jpg"), "img/é.jpg"),
        ("img/é.jpg", unicodedata.normalize("NFD", "img/é.jpg")),
        ("a b/ß.jpeg", "A B\\SS.JPEG"),
    ],
)
def test_an_image_whose_name_another_system_wrote_is_found(
    tmp_path: Path, there: str, named: str
) -> None:
    (tmp_path / there).parent.mkdir()
    (tmp_path / there).write_bytes(IMAGE)
    index = table(tmp_path, f"image,caption\n{named},a\n")
    assert rows_of(index, "path", "problem") == [(str(tmp_path / there), 0)]
    assert SampleReader(index).read_row(0) == IMAGE


def test_a_name_that_fits_two_images_is_missing(tmp_path: Path) -> None:
    for name in ("a.JPG", "A.jpg"):
        (tmp_path / name).write_bytes(IMAGE)
    index = table(tmp_path, "image,caption\n0.jpg,a\na.jpg,b\n")
    assert [problem for (problem,) in rows_of(index, "problem")] == [0, Status.MISSING_IMAGE]


def test_images_of_which_none_is_there_are_refused_with_what_is(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "x0.jpg").write_bytes(IMAGE)
    with pytest.raises(SourceError, match=r"holds no images .*In .*/img there is 'x0\.jpg'"):
        table(tmp_path, "image,caption\nimg/0.jpg,a\nimg/1.jpg,b\n")
    assert not (tmp_path / "index.parquet").exists()


def test_images_may_lie_elsewhere_and_be_named_by_absolute_paths(tmp_path: Path) -> None:
    photos = tmp_path / "disk" / "photos"
    photos.mkdir(parents=True)
    (photos / "a.jpg").write_bytes(IMAGE)
    text = f"image,caption\n{photos / 'a.jpg'},a\n"
    for images in (photos, tmp_path / "disk", Path("/")):
        assert rows_of(table(tmp_path, text, images=images), "size") == [(len(IMAGE),)]
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(SourceError, match="Set `images` of the source to the folder that holds"):
        table(tmp_path / "elsewhere", text)
    url = f"image,caption\nfile://{photos / 'a.jpg'},a\n"
    assert rows_of(table(tmp_path, url, images=photos), "size") == [(len(IMAGE),)]
    relative = table(tmp_path / "elsewhere", "image,caption\na.jpg,a\n", images=photos)
    assert rows_of(relative, "path") == [(str(photos / "a.jpg"),)]


def test_urls_are_refused_with_how_to_fetch_them(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"img2dataset --url_list .* --output_format webdataset"):
        table(tmp_path, "image,caption\nhttps://example.org/1.jpg,a\n")


def test_a_folder_of_pictures_needs_no_table(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for name in (
        "b/2.JPG",
        "1.jpg",
        "__MACOSX/._1.jpg",
        ".hidden/3.jpg",
        "b/._2.JPG",
        "@eaDir/x.jpg",
    ):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(IMAGE)
    (photos / "1.txt").write_text("a cat\n")
    (photos / "b" / "2.caption").write_text("a dog")
    (photos / "b" / "notes.pdf").write_text("?")
    index = built(tmp_path, kind="folder", path=photos)
    assert rows_of(index, "key") == [("photos/1",), ("photos/b/2",)]
    assert captions_of(index) == [{"txt": "a cat"}, {"txt": "a dog"}]
    assert SampleReader(index).read(0, 2) == [IMAGE, IMAGE]
    (photos / "captions.csv").write_text("image,caption\n")
    with pytest.raises(SourceError, match=r"Set `path` of the source to .*/captions\.csv"):
        built(tmp_path, kind="folder", path=photos)


def test_class_folders_as_systems_leave_them(tmp_path: Path) -> None:
    names = ["cat/1.jpg", "cat/._1.jpg", "cat/Thumbs.db", "dog/2.ppm", "__MACOSX/._x.jpg"]
    names += ["lost+found/.x", "@eaDir/1.jpg", "empty/notes.txt", "deep/er/1.jpg"]
    for name in names:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(IMAGE)
    index = built(tmp_path, kind="classes", path=tmp_path / "images")
    assert index.class_names == ("cat", "dog")
    assert rows_of(index, "key", "label") == [("cat/1", 0), ("dog/2", 1)]


def test_a_part_of_the_folders_of_a_list_has_its_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("n02091244", "n01855672"):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "1.jpg").write_bytes(IMAGE)
    source = {"kind": "classes", "path": tmp_path / "val", "class_names": "imagenet-1k"}
    assert built(tmp_path, **source).class_names == ("goose", "Ibizan Hound")
    assert "2 of the 1000 classes of imagenet-1k" in caplog.text
    (tmp_path / "val" / "cats").mkdir()
    (tmp_path / "val" / "cats" / "1.jpg").write_bytes(IMAGE)
    with pytest.raises(SourceError, match=r"1 are none of its 1000 classes \['cats'\]"):
        built(tmp_path, **source)


def test_every_suffix_of_a_format_that_is_decoded_has_rows() -> None:
    from features.images import FORMATS

    Image.init()
    suffixes = {name[1:] for name, form in Image.registered_extensions().items() if form in FORMATS}
    assert suffixes <= IMAGE_SUFFIXES


def shard(folder: Path, *members: tuple[str, str | bytes], **settings: Any) -> Index:
    encoded = [(name, text.encode() if isinstance(text, str) else text) for name, text in members]
    tiny.write_tar(folder / "s.tar", encoded)
    return built(folder, kind="webdataset", path=folder / "s.tar", **settings)


@pytest.mark.parametrize("place", ["dataset_type.txt", "../dataset_type.txt"])
def test_lines_of_a_txt_are_captions_where_the_data_set_is_one_of_retrieval(
    tmp_path: Path, place: str
) -> None:
    folder = tmp_path / "test"
    folder.mkdir()
    members = ("1.webp", IMAGE), ("1.txt", "a\n b\r\n\nc\u2028d"), ("2.webp", IMAGE), ("2.txt", "e")
    index = shard(folder, *members)
    assert captions_of(index) == [{"txt": "a\n b\r\n\nc\u2028d"}, {"txt": "e"}]
    assert index.counts["captions of several lines in a .txt (each one caption)"] == 1
    (folder / place).write_text("retrieval\n")
    assert captions_of(shard(folder, *members)) == [
        {"0": "a", "1": "b", "2": "c\u2028d"},
        {"0": "e"},
    ]


def test_texts_are_decoded_by_their_mark_or_setting_or_left_out(tmp_path: Path) -> None:
    texts = {
        "utf8": "grün".encode(),
        "bom": "grün".encode("utf-8-sig"),
        "utf16": "grün".encode("utf-16"),
        "utf32": "grün".encode("utf-32"),
        "latin": "grün".encode("cp1252"),
        "bare16": "grun".encode("utf-16-le"),
    }
    members = [
        (f"{name}.{end}", data)
        for name, text in texts.items()
        for end, data in [("jpg", IMAGE), ("txt", text)]
    ]
    index = shard(tmp_path, *members)
    found = dict(zip(texts, captions_of(index), strict=True))
    read = {"txt": "grün"}
    assert found == dict.fromkeys(["utf8", "bom", "utf16", "utf32"], read) | {
        "latin": {},
        "bare16": {},
    }
    assert sum(count for what, count in index.counts.items() if "not in UTF-8" in what) == 2
    again = shard(tmp_path, ("1.jpg", IMAGE), ("1.txt", texts["latin"]), encoding="cp1252")
    assert captions_of(again) == [read]


def test_the_image_may_be_a_member_of_a_longer_suffix(tmp_path: Path) -> None:
    members = ("1.image.png", IMAGE), ("1.mask.png", b"mask"), ("1.caption.txt", "a")
    given = {"captions": ["caption.txt"]}
    with pytest.raises(SourceError, match=r"\.image\.png \(not used\).*Correct `path` or `image`"):
        shard(tmp_path, *members, **given)
    index = shard(tmp_path, *members, **given, image="image.png")
    assert captions_of(index) == [{"caption.txt": "a"}]
    assert SampleReader(index).read_row(0) == IMAGE


def test_a_depth_map_is_not_taken_for_the_image_that_follows(tmp_path: Path) -> None:
    index = shard(
        tmp_path, ("1.pgm", b"depth"), ("1.webp", IMAGE), ("2.jpg", IMAGE), ("2.pgm", b"d")
    )
    assert SampleReader(index).read(0, 2) == [IMAGE, IMAGE]


def test_shards_put_behind_each_other_keep_all_samples_apart(tmp_path: Path) -> None:
    members = [("1.jpg", IMAGE), ("1.txt", b"a"), ("2.jpg", IMAGES[1])]
    content = tiny.write_tar(tmp_path / "one.tar", members).read_bytes()
    (tmp_path / "two.tar").write_bytes(content * 2)
    index = built(tmp_path, kind="webdataset", path=tmp_path / "two.tar")
    keys = [("two/1", 0), ("two/2", 0), ("two/1@2", 0), ("two/2@2", 0)]
    assert rows_of(index, "key", "problem") == keys
    assert SampleReader(index).read(0, 4) == [IMAGE, IMAGES[1]] * 2


def views(kind: pa.DataType) -> pa.Table:
    image = pa.array(IMAGES[:2], pa.binary()).cast(kind)
    return pa.table({"image": image, "caption": pa.array(["a", "b"], pa.string_view())})


PARQUET: dict[str, Callable[[], pa.Table]] = {
    "binary view": lambda: views(pa.binary_view()),
    "large binary": lambda: views(pa.large_binary()),
    "dictionary": lambda: pa.table(
        {
            "image": pa.array(IMAGES[:2]).dictionary_encode(),
            "caption": pa.array(["a", "b"]).dictionary_encode(),
        }
    ),
    "bytes and paths": lambda: paths(IMAGES[:2]),
    "paths without bytes": lambda: paths([None, None]),
    "paths": lambda: pa.table({"image": ["img/0.jpg", "img/1.jpg"], "caption": ["a", "b"]}),
    "large strings": lambda: pa.table(
        {"image": pa.array(["img/0.jpg", "img/1.jpg"], pa.large_string()), "caption": ["a", "b"]}
    ),
}


def paths(images: Sequence[bytes | None]) -> pa.Table:
    cells = [{"bytes": image, "path": f"img/{i}.jpg"} for i, image in enumerate(images)]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.table({"image": pa.array(cells, kind), "caption": ["a", "b"]})


@pytest.mark.parametrize("form", ["parquet", "arrow stream", "arrow file"])
@pytest.mark.parametrize("name", PARQUET)
def test_parquet_and_arrow_as_their_writers_make_them(tmp_path: Path, name: str, form: str) -> None:
    (tmp_path / "img").mkdir()
    for number in range(2):
        (tmp_path / "img" / f"{number}.jpg").write_bytes(IMAGES[number])
    made, path = PARQUET[name](), tmp_path / f"data.{form.split()[0]}"
    if form == "parquet":
        pq.write_table(made, path)
    else:
        new = pa.ipc.new_stream if form == "arrow stream" else pa.ipc.new_file
        with new(str(path), made.schema) as writer:
            writer.write_table(made, 1)
    index = built(tmp_path, kind="parquet", path=path)
    assert captions_of(index) == A_B
    assert SampleReader(index).read(0, 2) == IMAGES[:2]
    assert [SampleReader(index).read_row(row) for row in (1, 0)] == [IMAGES[1], IMAGES[0]]


def test_a_column_of_use_that_stands_twice_is_refused(tmp_path: Path) -> None:
    columns = [pa.array([IMAGE]), pa.array(["a"]), pa.array(["b"])]
    pq.write_table(
        pa.Table.from_arrays(columns, ["image", "caption", "caption"]), tmp_path / "p.parquet"
    )
    for kind in ("parquet", "folder"):
        with pytest.raises(SourceError, match="2 columns called 'caption'"):
            built(tmp_path, kind=kind, path=tmp_path / "p.parquet")


@pytest.mark.parametrize("name", ["zarr.json", "__x", "a/b", ".x", "x" * 300, ""])
def test_a_name_that_no_caption_field_can_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError, match="cannot be a caption field"):
        shard(tmp_path, ("1.jpg", IMAGE), captions=[name])


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("cat\ndog\n", ("cat", "dog")),
        ("cat\u2028s\r\ndog\n\n\n", ("cat\u2028s", "dog")),
        ("cat\n\ndog\n", "Line 2 of the class names .* is empty"),
        (b"\xff\xfec\0a\0t\0", ("cat",)),
        (b"gr\xfcn\n", "are not in UTF-8"),
    ],
)
def test_class_names_are_the_lines_of_a_file(
    tmp_path: Path, content: str | bytes, names: tuple[str, ...] | str
) -> None:
    (tmp_path / "names.txt").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    settings = {"class_names": tmp_path / "names.txt"}
    if isinstance(names, str):
        with pytest.raises(SourceError, match=names):
            shard(tmp_path, ("1.jpg", IMAGE), **settings)
    else:
        assert shard(tmp_path, ("1.jpg", IMAGE), **settings).class_names == names


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        ("classes", "captions", ["a"]),
        ("classes", "label", "class"),
        ("cifar", "group", "g"),
        ("annotations", "class_names", "imagenet-1k"),
        ("scenes", "captions", "short"),
    ],
)
def test_a_setting_that_nothing_would_read_is_refused(
    kind: str, setting: str, value: object
) -> None:
    needed = {"path": "x", "split": "test", "format": "coco", "rows": 2}
    fields = SOURCES[kind].model_fields
    given = {name: value for name, value in needed.items() if name in fields}
    parsed({"kind": kind, **given, setting: fields[setting].default})
    with pytest.raises(
        ValidationError, match=f"`{setting}` has no effect on a source of kind '{kind}'"
    ):
        parsed({"kind": kind, **given, setting: value})


@pytest.mark.parametrize(
    ("form", "setting"),
    [("coco", {"split": "val"}), ("mmvp", {"captions_per_image": 1})],
)
def test_a_setting_of_other_annotations_is_refused(form: str, setting: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"`{next(iter(setting))}` has no effect on format"):
        parsed({"kind": "annotations", "path": "x", "format": form, **setting})


def test_every_setting_is_read_somewhere_in_the_program() -> None:
    """By its name, as an attribute or as the argument of what it is handed to as a whole."""
    read = set[str]()
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.arg):
                read.add(node.arg)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                read.update(re.findall(r"^[a-z_]+$", node.value))
    # The splits of a measure are read by its name: `getattr(settings, measure.name)`.
    read.update(measure.name for measure in MEASURES)
    unread = {
        f"{model.__name__}.{name}"
        for model in settings_of(RunConfig)
        for name in model.model_fields
        if name not in read
    }
    assert unread == set()


def settings_of(model: type[BaseModel]) -> set[type[BaseModel]]:
    """Return the sections of a run file, from the whole down."""
    found, left = set[type[BaseModel]](), [model]
    while left:
        section = left.pop()
        if section not in found:
            found.add(section)
            annotations = [field.annotation for field in section.model_fields.values()]
            left += [each for annotation in annotations for each in models_in(annotation)]
    return found


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)


def test_lists_and_lines() -> None:
    assert lines_of("a\r\nb\x85c\u2028d\n") == ["a", "b\x85c\u2028d"]
    assert lines_of("a\n\nb") == ["a", "", "b"]
    assert listed_texts(r"""['it\'s', "x, y"]""") == ["it's", "x, y"]
    assert [listed_texts(text) for text in ("['a', 3]", "[]", "['a'", "[a]", "['a'] b")] == [
        None
    ] * 5
    assert decoded("a€".encode()[:-1], is_cut=True) == "a"
    assert decoded("a€".encode()[:-1]) is None
