"""What every kind of source must do, and what becomes a sample of each, under which key."""

import csv
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from features.errors import SourceError
from features.index import SampleReader
from features.scenes import shards as scenes
from features.sources import Sample, Source
from features.sources.folder import REPEATED_ROWS
from features.sources.parquet import ParquetImages
from features.sources.webdataset import REPEATED
from features.status import Status
from tests import published, tiny
from tests.servers import HubServer
from tests.source_suite import IMAGES, SourceTests, kinds_without_suite, parsed

IMAGE = tiny.encoded(tiny.picture(0))


def listed(counts: Counter[str] | None = None, **settings: Any) -> list[Sample]:
    """All samples of a source given as in a run file."""
    shards = parsed(settings).open()
    counts = Counter() if counts is None else counts
    samples = [sample for file in shards.files for sample in shards.samples(file, counts)]
    shards.check()
    return samples


def halves(images: Sequence[bytes]) -> list[tuple[str, Sequence[bytes]]]:
    return [("a", images[:2]), ("b", images[2:])]


class TestEveryWebdataset(SourceTests):
    kind = "webdataset"

    def make(self, folder: Path, images: Sequence[bytes]) -> dict[str, Any]:
        for name, some in halves(images):
            members = [(f"{number}.jpg", image) for number, image in enumerate(some)]
            tiny.write_tar(folder / f"{name}.tar", members)
        return {"path": folder / "{a,b}.tar"}

    def all_used(self, folder: Path) -> dict[str, Any]:
        record = json.dumps({"caption": "a", "label": 1, "group": 1, "url": "u"}).encode()
        members = [("1.jpg", IMAGE), ("1.json", record), ("1.txt", b"a")]
        tiny.write_tar(folder / "a.tar", members)
        (folder / "table.csv").write_text("url,long\nu,b\n")
        return {"table": folder / "table.csv", "join": "url"}


class TestEveryFolder(SourceTests):
    kind = "folder"

    def make(self, folder: Path, images: Sequence[bytes]) -> dict[str, Any]:
        names = write_images(folder, images)
        (folder / "table.csv").write_text("\n".join(["image", *names]))
        return {"path": folder / "table.csv"}

    def all_used(self, folder: Path) -> dict[str, Any]:
        (folder / "more.csv").write_text("image,long\nu,b\n")
        return {"table": folder / "more.csv", "join": "image"}


class TestEveryParquet(SourceTests):
    kind = "parquet"

    def make(self, folder: Path, images: Sequence[bytes]) -> dict[str, Any]:
        folder.mkdir()
        for name, some in halves(images):
            pq.write_table(pa.table({"image": some}), folder / f"{name}.parquet")
        return {"path": folder / "*.parquet"}


class TestEveryHub(SourceTests):
    kind = "hub"

    @pytest.fixture(autouse=True)
    def _hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        with HubServer(tmp_path / "source", "owner/name") as server:
            server.reach(monkeypatch)
            yield

    def make(self, folder: Path, images: Sequence[bytes]) -> dict[str, Any]:
        (folder / "data").mkdir(parents=True)
        for name, some in halves(images):
            pq.write_table(pa.table({"image": some}), folder / "data" / f"train-{name}.parquet")
        return {"repository": "owner/name"}

    def absent(self, folder: Path) -> dict[str, Any]:  # noqa: ARG002
        return {"repository": "owner/nowhere"}


class TestEveryClasses(SourceTests):
    kind = "classes"

    def make(self, folder: Path, images: Sequence[bytes]) -> dict[str, Any]:
        for name, some in halves(images):
            write_images(folder / name, some)
        return {"path": folder}


class TestEveryCifar(SourceTests):
    """The images are pixels, so that none of them is broken: these are the bytes of others."""

    kind = "cifar"

    def make(self, folder: Path, images: Sequence[bytes]) -> dict[str, Any]:
        folder.mkdir()
        records = b"".join(b"\0" + self.planes(image) for image in images)
        (folder / "test_batch.bin").write_bytes(records)
        (folder / "batches.meta.txt").write_text("cat\ndog\n")
        return {"path": folder, "split": "test"}

    def held(self, images: Sequence[bytes]) -> list[bytes | None]:
        pixels = [np.frombuffer(self.planes(each), np.uint8).reshape(3, -1) for each in images]
        return [b"P6 32 32 255\n" + planes.T.tobytes() for planes in pixels]

    def planes(self, image: bytes) -> bytes:
        return image.ljust(3072, b"x")[:3072]


class TestEveryPublished(SourceTests):
    kind = "published"

    def make(self, folder: Path, images: Sequence[bytes]) -> dict[str, Any]:
        pictures = [(image, label) for label, image in enumerate(images)]
        return {"path": published.write(folder, "food-101", pictures), "dataset": "food-101"}


class TestEveryAnnotations(SourceTests):
    kind = "annotations"

    def make(self, folder: Path, images: Sequence[bytes]) -> dict[str, Any]:
        names = write_images(folder / "images", images)
        (folder / "results.token").write_text("".join(f"{name}#0\ta cat\n" for name in names))
        path, kind = folder / "results.token", "flickr30k"
        return {"path": path, "images": folder / "images", "format": kind}

    def all_used(self, folder: Path) -> dict[str, Any]:
        entry = {"filename": "0.jpg", "split": "val", "sentences": [{"raw": "a cat"}]}
        (folder / "dataset.json").write_text(json.dumps({"images": [entry]}))
        return {"path": folder / "dataset.json", "format": "karpathy", "split": "val"}


class TestEveryScenes(SourceTests):
    """The images are drawn, so that none of them is broken until its tar is."""

    kind = "scenes"

    def make(self, folder: Path, images: Sequence[bytes]) -> dict[str, Any]:  # noqa: ARG002
        return {"split": "test", "rows": len(images)}

    def held(self, images: Sequence[bytes]) -> list[bytes | None]:
        rows = range(len(images))
        return [next(scenes.members(scenes.sample("test", 0, row)))[1] for row in rows]

    def test_a_broken_image_keeps_its_row(self, tmp_path: Path) -> None:
        settings = {"kind": self.kind, **self.make(tmp_path, IMAGES)}
        (place,) = self.opened(tmp_path, settings).files
        first, *others = self.held(IMAGES)
        torn, file = bytes(len(first or b"")), Path(str(place))
        file.write_bytes(file.read_bytes().replace(first or b"", torn))
        reader = SampleReader(self.built(tmp_path, settings))
        assert reader.read(0, 4) == [torn, *others]

    def test_a_path_that_is_not_there_is_refused(
        self, tmp_path: Path, settings: dict[str, Any]
    ) -> None:
        with pytest.raises(ValidationError, match="nowhere"):  # it has none
            self.opened(tmp_path, settings | {"path": tmp_path / "nowhere"})

    @pytest.mark.parametrize(
        "wrong",
        [{"split": "val"}, {"rows": 0}, {"seed": -1}, {"split": "compositional", "rows": 3}],
    )
    def test_settings_that_cannot_be_drawn_are_refused(
        self, settings: dict[str, Any], wrong: dict[str, Any]
    ) -> None:
        with pytest.raises(ValidationError, match=str(list(wrong)[-1])):
            parsed(settings | wrong)

    def test_it_needs_a_folder_to_be_drawn_into(self, settings: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="needs a folder to draw into"):
            parsed(settings).open()


def test_every_kind_has_a_suite() -> None:
    assert kinds_without_suite() == set()


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("webdataset", {}),
        ("folder", {"image": "image"}),
        ("parquet", {"image": "image", "key": None}),
        ("classes", {"names": None}),
        ("cifar", {"split": "test"}),
        (
            "annotations",
            {"format": "coco", "images": None, "split": "test", "captions_per_image": 5},
        ),
    ],
)
def test_an_index_records_the_settings_that_earlier_ones_have(
    kind: str, more: dict[str, Any]
) -> None:
    """Else an index and a store that are there would be taken for those of another source."""
    needed: dict[str, Any] = {name: more[name] for name in ("format", "split") if name in more}
    common: dict[str, Any] = {
        "captions": [],
        "label": "label",
        "group": "group",
        "class_names": None,
        "rows": None,
    }
    recorded = parsed({"kind": kind, "path": "/data/x", **needed}).recorded()
    assert recorded == {"kind": kind, "path": "/data/x", **common, **more}


def tar(path: Path, *members: tuple[str, bytes | str]) -> dict[str, Any]:
    """Write a tar, and return the settings that name it."""
    encoded = [(name, text.encode() if isinstance(text, str) else text) for name, text in members]
    return {"kind": "webdataset", "path": str(tiny.write_tar(path, encoded))}


class TestWebdataset:
    def test_members_of_one_base_name_are_one_sample(self, tmp_path: Path) -> None:
        record = {"caption": "a cat", "label": 3, "group": 7}
        source = tar(tmp_path / "s-0.tar", ("a/1.jpg", IMAGE), ("a/1.json", json.dumps(record)))
        (sample,) = listed(**source)
        assert sample.key == "s-0/a/1"
        assert sample.captions == {"caption": "a cat"}
        assert (sample.label, sample.group, sample.problem) == (3, 7, 0)
        with Path(sample.path).open("rb") as file:
            file.seek(sample.offset)
            assert file.read(sample.size) == IMAGE

    def test_the_base_name_ends_at_the_first_dot_so_that_a_mask_is_no_image(
        self, tmp_path: Path
    ) -> None:
        counts = Counter[str]()
        source = tar(tmp_path / "s.tar", ("1.mask.png", b"mask"), ("1.JPG", IMAGE))
        (sample,) = listed(counts, **source)
        assert (sample.key, sample.size) == ("s/1", len(IMAGE))
        assert counts == {"members .mask.png (not used)": 1}

    def test_text_members_are_captions_too(self, tmp_path: Path) -> None:
        source = tar(tmp_path / "s.tar", ("1.jpg", IMAGE), ("1.txt", "\ufeffa cat\n"))
        assert listed(**source)[0].captions == {"txt": "a cat"}

    @pytest.mark.parametrize("names", ["txt", ["txt"]])
    def test_one_name_of_captions_needs_no_list(self, tmp_path: Path, names: object) -> None:
        source = tar(tmp_path / "s.tar", ("1.jpg", IMAGE), ("1.txt", "a cat"))
        assert listed(**source, captions=names)[0].captions == {"txt": "a cat"}

    def test_a_caption_that_is_there_twice_is_counted_unless_one_is_named(
        self, tmp_path: Path
    ) -> None:
        members = ("1.jpg", IMAGE), ("1.json", '{"caption": "a cat "}'), ("1.txt", "a cat")
        source, counts = tar(tmp_path / "s.tar", *members), Counter[str]()
        assert listed(counts, **source)[0].captions == {"caption": "a cat ", "txt": "a cat"}
        assert counts[REPEATED] == counts.total() == 1
        assert listed(counts, **source, captions="txt")[0].captions == {"txt": "a cat"}
        assert counts.total() == 1

    def test_a_list_of_captions_becomes_numbered_fields(self, tmp_path: Path) -> None:
        record = json.dumps({"captions": ["one", None, "three"]})
        source = tar(tmp_path / "s.tar", ("1.jpg", IMAGE), ("1.json", record))
        assert listed(**source)[0].captions == {"0": "one", "2": "three"}

    @pytest.mark.parametrize("value", [3, {"raw": 1}, [["a", "b"]], [{"token": "a"}, None]])
    def test_captions_that_are_no_text_are_counted(self, tmp_path: Path, value: object) -> None:
        counts = Counter[str]()
        record = json.dumps({"captions": value})
        (sample,) = listed(counts, **tar(tmp_path / "s.tar", ("1.jpg", IMAGE), ("1.json", record)))
        assert sample.captions == {}
        assert counts == {"captions that are no text, nor a list of texts (ignored)": 1}

    def test_two_lists_of_captions_are_refused(self, tmp_path: Path) -> None:
        record = json.dumps({"caption": ["a"], "captions": ["b"]})
        with pytest.raises(SourceError, match="lists of captions under 'caption' and 'captions'"):
            listed(**tar(tmp_path / "s.tar", ("1.jpg", IMAGE), ("1.json", record)))

    def test_a_class_member_is_the_label_if_asked_for(self, tmp_path: Path) -> None:
        source = tar(tmp_path / "s.tar", ("1.jpg", IMAGE), ("1.cls", "12"))
        assert listed(**source, label="cls")[0].label == 12

    def test_a_base_name_that_comes_again_is_numbered_and_quarantined(self, tmp_path: Path) -> None:
        names = ["1.jpg", "2.jpg", "1.jpg", "1.jpg", "2.txt"]
        samples = listed(**tar(tmp_path / "s.tar", *((name, IMAGE) for name in names)))
        assert [(sample.key, sample.problem) for sample in samples] == [
            ("s/1", 0),
            ("s/2", 0),
            ("s/1#2", Status.DUPLICATE_KEY),
            ("s/1#3", Status.DUPLICATE_KEY),
            ("s/2#2", Status.DUPLICATE_KEY),
        ]

    def test_captions_without_an_image_keep_a_quarantined_row(self, tmp_path: Path) -> None:
        counts = Counter[str]()
        source = tar(tmp_path / "s.tar", ("1.txt", "a cat"), ("2.jpg", IMAGE))
        assert [sample.problem for sample in listed(counts, **source)] == [Status.MISSING_IMAGE, 0]
        assert counts == {"samples without an image (quarantined)": 1}

    def test_what_belongs_to_no_sample_makes_no_row_and_is_counted(self, tmp_path: Path) -> None:
        names = ["README", "__MACOSX/._1.jpg", "/etc/1.jpg", "../1.jpg", "a/../1.jpg", "notes.md"]
        counts = Counter[str]()
        members = [(name, b"?") for name in names] + [("1.jpg", IMAGE)]
        assert [sample.key for sample in listed(counts, **tar(tmp_path / "s.tar", *members))] == [
            "s/1"
        ]
        assert counts.total() == len(names)

    def test_json_that_cannot_be_read_leaves_the_captions_missing(self, tmp_path: Path) -> None:
        for text in ("{", "[1]", "[" * 100_000, '{"caption": 3}', "\0"):
            (sample,) = listed(**tar(tmp_path / "s.tar", ("1.jpg", IMAGE), ("1.json", text)))
            assert sample.captions == {}

    def test_half_a_character_in_json_is_replaced(self, tmp_path: Path) -> None:
        source = tar(tmp_path / "s.tar", ("1.jpg", IMAGE), ("1.json", r'{"caption": "é\ud800"}'))
        assert listed(**source)[0].captions == {"caption": "é?"}

    @pytest.mark.parametrize("value", ["2.5", 1.5, "NaN", "Infinity", -5, 2**31, [1], "9" * 400])
    def test_a_label_that_is_no_whole_number_is_unknown_and_counted(
        self, tmp_path: Path, value: object
    ) -> None:
        record = '{"label": %s}' % (value if value in ("NaN", "Infinity") else json.dumps(value))
        counts = Counter[str]()
        source = tar(tmp_path / "s.tar", ("1.jpg", IMAGE), ("1.json", record))
        assert listed(counts, **source)[0].label == -1
        assert counts.total() == 1

    def test_shards_of_one_name_are_told_apart_by_their_folders(self, tmp_path: Path) -> None:
        for folder in ("x/a", "x/b", "y/a"):
            tar(tmp_path / folder / "s.tar", ("1.jpg", IMAGE))
        samples = listed(kind="webdataset", path=str(tmp_path / "**/*.tar"))
        assert [sample.key for sample in samples] == ["x/a/s/1", "x/b/s/1", "y/a/s/1"]

    def test_a_caption_name_that_no_sample_has_is_met_with_the_nearest(
        self, tmp_path: Path
    ) -> None:
        record = json.dumps({"caption_long": "a cat", "width": 3})
        source = tar(tmp_path / "s.tar", ("1.jpg", IMAGE), ("1.json", record))
        with pytest.raises(SourceError, match=r"'long_caption'\. Did you mean 'caption_long'"):
            listed(**source, captions=("long_caption",))

    def test_a_caption_name_that_would_leave_its_folder_is_refused(self, tmp_path: Path) -> None:
        source = tar(tmp_path / "s.tar", ("1.jpg", IMAGE))
        with pytest.raises(SourceError, match=r"'\.\./x' in `captions`"):
            listed(**source, captions=("../x",))


def write_images(folder: Path, images: Sequence[bytes]) -> list[str]:
    """Write images as files of a folder, and return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number}.jpg" for number in range(len(images))]
    for name, image in zip(names, images, strict=True):
        (folder / name).write_bytes(image)
    return names


def folder_of_images(path: Path, *names: str) -> None:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(IMAGE)


class TestFolder:
    def table(self, path: Path, rows: list[dict[str, Any]], suffix: str) -> dict[str, Any]:
        file = path / f"table{suffix}"
        if suffix == ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        elif suffix == ".csv":
            with file.open("w", encoding="utf-8", newline="") as lines:
                writer = csv.DictWriter(lines, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        else:
            pq.write_table(pa.Table.from_pylist(rows), file)
        return {"kind": "folder", "path": str(file)}

    @pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
    def test_a_row_names_a_file_its_caption_and_label(self, tmp_path: Path, suffix: str) -> None:
        folder_of_images(tmp_path, "images/é 1.jpg")
        row = {"image": "images/é 1.jpg", "caption": "a cat", "label": 2}
        (sample,) = listed(**self.table(tmp_path, [row], suffix))
        assert sample.key == "table/images/é 1"
        assert (sample.captions, sample.label) == ({"caption": "a cat"}, 2)
        assert (sample.path, sample.offset, sample.size) == (
            str(tmp_path / "images/é 1.jpg"),
            0,
            len(IMAGE),
        )

    def test_rows_of_one_image_are_one_sample_with_several_captions(self, tmp_path: Path) -> None:
        folder_of_images(tmp_path, "1.jpg", "2.jpg")
        rows = [
            {"image": f"{i}.jpg", "caption": text} for i, text in [(1, "a"), (1, "b"), (2, "c")]
        ]
        samples = listed(**self.table(tmp_path, rows, ".csv"))
        assert [sample.captions for sample in samples] == [{"0": "a", "1": "b"}, {"0": "c"}]

    def test_rows_of_one_image_are_one_sample_wherever_they_stand(self, tmp_path: Path) -> None:
        folder_of_images(tmp_path, "1.jpg", "2.jpg")
        rows = [
            {"image": f"{i}.jpg", "caption": text} for i, text in [(1, "a"), (2, "c"), (1, "b")]
        ]
        samples = listed(**self.table(tmp_path, rows, ".jsonl"))
        assert [(sample.key, sample.captions) for sample in samples] == [
            ("table/1", {"0": "a", "1": "b"}),
            ("table/2", {"0": "c"}),
        ]

    def test_a_row_that_stands_twice_is_one_sample_and_counted(self, tmp_path: Path) -> None:
        folder_of_images(tmp_path, "1.jpg", "2.jpg")
        rows = [{"image": name, "caption": "a"} for name in ("1.jpg", "2.jpg", "1.jpg")]
        counts = Counter[str]()
        samples = listed(counts, **self.table(tmp_path, rows, ".jsonl"))
        assert [sample.captions for sample in samples] == [{"caption": "a"}] * 2
        assert counts == {REPEATED_ROWS: 1}

    def test_an_image_in_two_groups_is_no_sample_of_both(self, tmp_path: Path) -> None:
        folder_of_images(tmp_path, "1.jpg")
        rows = [{"image": "1.jpg", "caption": text, "group": text} for text in "ab"]
        samples = listed(**self.table(tmp_path, rows, ".jsonl"))
        assert [(sample.key, sample.problem) for sample in samples] == [
            ("table/1", 0),
            ("table/1#2", Status.DUPLICATE_KEY),
        ]

    def test_names_that_differ_in_the_suffix_only_keep_it(self, tmp_path: Path) -> None:
        folder_of_images(tmp_path, "1.jpg", "1.png", "1.v2")
        rows = [{"image": name, "caption": "a"} for name in ("1.jpg", "1.png", "1.v2")]
        samples = listed(**self.table(tmp_path, rows, ".jsonl"))
        assert [sample.key for sample in samples] == ["table/1", "table/1.png", "table/1.v2"]
        assert not any(sample.problem for sample in samples)

    def test_links_within_the_folder_are_followed(self, tmp_path: Path) -> None:
        folder_of_images(tmp_path, "real/1.jpg")
        (tmp_path / "linked").symlink_to("real")
        (tmp_path / "2.jpg").symlink_to("linked/1.jpg")
        (tmp_path / "loop.jpg").symlink_to("loop.jpg")
        names = ("linked/1.jpg", "2.jpg", "real/../2.jpg", "loop.jpg", "real")
        rows = [{"image": name, "caption": "a"} for name in names]
        samples = listed(**self.table(tmp_path, rows, ".jsonl"))
        assert [sample.size for sample in samples] == [*3 * [len(IMAGE)], -1, -1]

    @pytest.mark.parametrize("name", ["gone.jpg", "x" * 5000, "\ud800.jpg"])
    def test_a_file_that_is_not_there_keeps_a_quarantined_row(
        self, tmp_path: Path, name: str
    ) -> None:
        (sample,) = listed(**self.table(tmp_path, [{"image": name, "caption": "a"}], ".jsonl"))
        assert (sample.problem, sample.size) == (Status.MISSING_IMAGE, -1)

    @pytest.mark.parametrize("name", ["../1.jpg", "..", "../gone", "/etc/hostname", "out/1.jpg"])
    def test_a_path_that_leaves_the_folder_is_refused(self, tmp_path: Path, name: str) -> None:
        folder_of_images(tmp_path, "1.jpg", "data/a/2.jpg")
        (tmp_path / "data/out").symlink_to(tmp_path)
        source = self.table(tmp_path / "data", [{"image": name, "caption": "a"}], ".jsonl")
        target = (tmp_path / "data" / name).resolve()
        with pytest.raises(SourceError, match=f"which is not inside .*, but leads to {target}"):
            listed(**source)

    def test_a_row_without_an_image_lists_its_columns(self, tmp_path: Path) -> None:
        source = self.table(tmp_path, [{"file": "1.jpg", "caption": "a"}], ".csv")
        with pytest.raises(SourceError, match=r"Row 1 .* columns are \['file', 'caption'\]"):
            listed(**source)

    def text(self, path: Path, text: str, name: str = "table.csv") -> dict[str, Any]:
        (path / name).write_bytes(text.encode())
        return {"kind": "folder", "path": str(path / name)}

    @pytest.mark.parametrize("name", ["table.CSV", "table.tsv"])
    @pytest.mark.parametrize(
        "text",
        [
            "image;caption\r\n1.jpg;a, b\r\n",
            "\ufeffimage;caption;notes, mine\r\n1.jpg;a, b;\r\n",
            "image\tcaption\n1.jpg\ta, b\n",
            'image,caption,"a;b",c;d\n1.jpg,"a, b"\n',
            '"image";"caption"\n"1.jpg";"a, b"\n',
            '"number;of,row",image,caption\n7,1.jpg,"a, b"\n',
            'image,"line\n;break",caption\n1.jpg,,"a, b"\n',
            'image,caption\n1.jpg,"a, b",,\n',
            'image,caption,note\n1.jpg,"a, b",a 12" disc\n',
        ],
    )
    def test_the_first_separator_of_the_first_line_separates_the_columns(
        self, tmp_path: Path, text: str, name: str
    ) -> None:
        (sample,) = listed(**self.text(tmp_path, text, name))
        assert (sample.key, sample.captions) == ("table/1", {"caption": "a, b"})

    def test_a_header_read_with_another_separator_is_shown(self, tmp_path: Path) -> None:
        source = self.text(tmp_path, "number,of row;image;caption\n7;1.jpg;a\n")
        with pytest.raises(SourceError, match=r"columns are \['number', 'of row;image;caption'\]"):
            listed(**source)

    def test_two_columns_of_one_name_are_refused(self, tmp_path: Path) -> None:
        source = self.text(tmp_path, "image,caption,caption,,\n1.jpg,a,b,,\n")
        with pytest.raises(SourceError, match=r"Line 1 .* names 'caption' twice"):
            listed(**source)

    @pytest.mark.parametrize(
        ("row", "fault"),
        [
            ("1.jpg,a cat, asleep", "more columns than the first line, ['image', 'caption']"),
            ('1.jpg,"a cat', "unexpected end of data"),
            ('1.jpg,"a cat\n2.jpg,"a dog"', "',' expected after '\"'"),
        ],
    )
    def test_a_line_of_a_csv_that_would_lose_text_is_refused(
        self, tmp_path: Path, row: str, fault: str
    ) -> None:
        whole = 'image,caption\n0.jpg,"two\nlines"'
        source = self.text(tmp_path, f"{whole}\n{row}\n3.jpg,a cow\n")
        with pytest.raises(SourceError, match=re.escape(fault)) as caught:
            listed(**source)
        assert str(caught.value).startswith(f"Line 4 of {source['path']} ")


class TestParquet:
    def files(self, path: Path, images: list[Any], **columns: list[Any]) -> dict[str, Any]:
        path.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": images} | columns), path / "p.parquet", row_group_size=3)
        return {"kind": "parquet", "path": str(path / "*.parquet")}

    def test_rows_are_found_again_by_their_number(self, tmp_path: Path) -> None:
        source = self.files(tmp_path, [IMAGE] * 4, caption=list("abcd"), label=[0, 1, 2, None])
        samples = listed(**source)
        assert [sample.key for sample in samples][-1] == "p/000000003"
        assert [sample.offset for sample in samples] == [0, 1, 2, 3]
        assert [sample.label for sample in samples] == [0, 1, 2, -1]
        assert samples[1].captions == {"caption": "b"}

    def test_a_column_may_give_the_keys(self, tmp_path: Path) -> None:
        samples = listed(**self.files(tmp_path, [IMAGE] * 4, id=[7, 7, None, None]), key="id")
        keys = [sample.key for sample in samples]
        assert keys == ["p/7", "p/7#2", "p/000000002", "p/000000003"]
        assert [sample.problem for sample in samples] == [0, Status.DUPLICATE_KEY, 0, 0]

    def test_columns_of_no_use_are_not_read(self, tmp_path: Path) -> None:
        beyond = pa.array([2**40], pa.timestamp("s"))  # no date of Python's
        source = self.files(tmp_path, [IMAGE], caption=["a"], taken=beyond)
        assert listed(**source)[0].captions == {"caption": "a"}
        with pytest.raises(SourceError, match=r"'take'\. Did you mean 'taken'"):
            listed(**source, captions=["take"])

    @pytest.mark.parametrize("as_struct", [False, True])
    def test_images_are_found_in_any_order_and_row_group(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_struct: bool
    ) -> None:
        monkeypatch.setattr("features.sources.parquet.IMAGES_AT_ONCE", 4)
        monkeypatch.setattr("features.sources.parquet.BATCHES_KEPT", 2)
        images = [f"image {row}".encode() if row % 7 else None for row in range(90)]
        cells = [{"bytes": image, "path": None} for image in images] if as_struct else images
        paths = [str(tmp_path / name) for name in ("a.parquet", "b.parquet")]
        for path, size in zip(paths, (10, 100), strict=True):
            pq.write_table(pa.table({"image": cells}), path, row_group_size=size)
        reader, generator = ParquetImages("image"), random.Random(0)
        for _ in range(100):
            first = generator.randrange(85)
            rows = range(first, first + 5)
            found = reader.read(generator.choice(paths), [(row, -1) for row in rows])
            assert found == [images[row] for row in rows]

    def test_a_row_group_larger_than_memory_is_read_a_few_images_at_a_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("features.sources.parquet.BATCHES_KEPT", 2)
        images = [random.Random(row).randbytes(1000) * 50 for row in range(1000)]
        path = tmp_path / "p.parquet"
        table = pa.table({"image": images})
        options = {"row_group_size": 1000, "write_batch_size": 16, "use_dictionary": False}
        pq.write_table(table, path, compression="none", **options)
        del table
        reader, pool, most = ParquetImages("image"), pa.default_memory_pool(), 0
        before = pool.bytes_allocated()
        for first in range(0, 1000, 50):
            places = [(row, -1) for row in range(first, first + 50)]
            assert reader.read(str(path), places) == images[first : first + 50]
            most = max(most, pool.bytes_allocated() - before)
        assert 0 < most < path.stat().st_size / 4

    def test_a_column_of_something_else_is_refused(self, tmp_path: Path) -> None:
        source = self.files(tmp_path, [1])
        with pytest.raises(SourceError, match=r"'image' of .* holds int64"):
            listed(**source)
        with pytest.raises(SourceError, match=r"no column 'picture'; it has \['image'\]"):
            listed(**source, image="picture")


class TestClassFolders:
    def test_sorted_folders_are_the_labels(self, tmp_path: Path) -> None:
        folder_of_images(tmp_path, "dog/1.jpg", "cat/2.PNG", "cat/1.jpg", ".cache/1.jpg")
        (tmp_path / "cat/notes.txt").write_text("?")
        counts = Counter[str]()
        samples = listed(counts, kind="classes", path=str(tmp_path))
        assert [(sample.key, sample.label) for sample in samples] == [
            ("cat/1", 0),
            ("cat/2", 0),
            ("dog/1", 1),
        ]
        assert counts == {"files that are no images (ignored)": 1}

    def named(self, folder: Path, names: dict[str, Any], setting: str) -> Source:
        folder_of_images(folder, "images/a/1.jpg", "images/b/1.jpg")
        (folder / "names.json").write_text(json.dumps(names))
        place = folder / "names.json"
        return parsed({"kind": "classes", "path": folder / "images", setting: place})

    @pytest.mark.parametrize("setting", ["class_names", "names"])
    @pytest.mark.parametrize(
        "names", [{"folders": ["b", "a"], "classes": ["Bee", "Ape"]}, {"classes": ["a", "b"]}]
    )
    def test_a_file_may_name_the_classes(
        self, tmp_path: Path, names: dict[str, Any], setting: str
    ) -> None:
        source = self.named(tmp_path, names, setting)
        expected = ("Ape", "Bee") if "folders" in names else ("a", "b")
        assert source.open().class_names() == expected
        assert source.recorded()["names"] == str(tmp_path / "names.json")

    def test_a_file_of_names_that_lacks_a_folder_is_refused(self, tmp_path: Path) -> None:
        source = self.named(tmp_path, {"folders": ["b"], "classes": ["Bee"]}, "class_names")
        with pytest.raises(SourceError, match="do not fit the folders"):
            source.open().class_names()

    def test_a_setting_under_both_of_its_names_is_refused(self) -> None:
        both = {"class_names": "imagenet-1k", "names": "imagenet-1k"}
        with pytest.raises(ValidationError, match="give one of them"):
            parsed({"kind": "classes", "path": "images", **both})
