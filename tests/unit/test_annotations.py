"""Benchmarks in the files of their authors: small ones, in exactly these formats."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from features.errors import SourceError
from features.sources import Sample, Source
from features.status import Status
from tests import tiny


def listed(counts: Counter[str] | None = None, **settings: Any) -> list[Sample]:
    """All samples of annotations given as in a run file."""
    settings = {"kind": "annotations", **settings, "path": str(settings["path"])}
    source: Source = TypeAdapter(Source).validate_python(settings)
    shards = source.open()
    counts = Counter() if counts is None else counts
    return [sample for file in shards.files for sample in shards.samples(file, counts)]


def image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tiny.encoded(tiny.picture(0)))
    return path


def captions(name: str, count: int = 5) -> dict[str, str]:
    return {str(i): f"{name} {i}" for i in range(count)}


class TestRetrieval:
    @pytest.fixture
    def karpathy(self, tmp_path: Path) -> Path:
        """As in dataset_coco.json; dataset_flickr30k.json has no `filepath`."""

        def entry(name: str, split: str, sentences: int, **more: str) -> dict[str, Any]:
            texts = [
                {"tokens": ["x"], "raw": f"{name} {i}", "imgid": 0, "sentid": i}
                for i in range(sentences)
            ]
            return {"filename": f"{name}.jpg", "split": split, "sentences": texts, **more}

        document = {
            "dataset": "coco",
            "images": [
                entry("COCO_val2014_1", "test", 6, filepath="val2014", cocoid="1"),
                entry("COCO_val2014_2", "restval", 5, filepath="val2014", cocoid="2"),
                entry("3", "test", 5),
            ],
        }
        path = tmp_path / "dataset_coco.json"
        path.write_text(json.dumps(document))
        image(tmp_path / "images" / "val2014" / "COCO_val2014_1.jpg")
        image(tmp_path / "images" / "3.jpg")
        return path

    def test_the_karpathy_test_split_has_the_first_five_captions(self, karpathy: Path) -> None:
        samples = listed(path=karpathy, format="karpathy", images=karpathy.parent / "images")
        assert [sample.key for sample in samples] == [
            "dataset_coco/val2014/COCO_val2014_1",
            "dataset_coco/3",
        ]
        assert [sample.captions for sample in samples] == [
            captions("COCO_val2014_1"),
            captions("3"),
        ]
        assert [sample.problem for sample in samples] == [0, 0]

    def test_a_split_that_is_not_there_is_named_with_those_that_are(self, karpathy: Path) -> None:
        with pytest.raises(SourceError, match=r"it has the splits \['restval', 'test'\]"):
            listed(path=karpathy, format="karpathy", split="val")

    def test_coco_joins_captions_to_images_by_id(self, tmp_path: Path) -> None:
        document = {
            "info": {},
            "licenses": [],
            "images": [
                {"id": 9, "file_name": "000000000009.jpg", "height": 2, "width": 2},
                {"id": 4, "file_name": "000000000004.jpg", "height": 2, "width": 2},
            ],
            "annotations": [
                {"image_id": number, "id": 10 * i + number, "caption": f"{number} {i}"}
                for i in range(6)
                for number in (9, 4)
            ],
        }
        path = tmp_path / "annotations" / "captions_val2017.json"
        path.parent.mkdir()
        path.write_text(json.dumps(document))
        image(tmp_path / "val2017" / "000000000004.jpg")
        counts = Counter[str]()
        samples = listed(counts, path=path, format="coco", images=tmp_path / "val2017")
        assert [sample.captions for sample in samples] == [captions("4"), captions("9")]
        assert [sample.problem for sample in samples] == [0, Status.MISSING_IMAGE]
        assert counts["image files that are not there (quarantined)"] == 1

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            (
                "results_20130124.token",
                "10.jpg#0\tTwo men , one # 3 | here .\n10.jpg#1\tMen .\n20.jpg#0\tA dog .\n",
            ),
            (
                "results.csv",
                "image_name| comment_number| comment\n10.jpg| 0| Two men , one # 3 | here .\n"
                "10.jpg| 1| Men .\n20.jpg| 4   A dog .\n",  # as one line of it is
            ),
        ],
    )
    def test_flickr30k_comes_as_tokens_or_as_csv(
        self, tmp_path: Path, name: str, text: str
    ) -> None:
        (tmp_path / name).write_text(text)
        samples = listed(path=tmp_path / name, format="flickr30k")
        assert [sample.captions for sample in samples] == [
            {"0": "Two men , one # 3 | here .", "1": "Men ."},
            {"0": "A dog ."},
        ]

    def test_captions_of_images_that_a_part_of_coco_has_not_are_counted(
        self, tmp_path: Path
    ) -> None:
        document = {
            "images": [{"id": 4, "file_name": "4.jpg"}],
            "annotations": [
                {"image_id": number, "id": number, "caption": "a cat"} for number in (99, 4, 98)
            ],
        }
        (tmp_path / "captions.json").write_text(json.dumps(document))
        counts = Counter[str]()
        (sample,) = listed(counts, path=tmp_path / "captions.json", format="coco")
        assert sample.captions == {"0": "a cat"}
        assert counts["captions of images that the file does not list (ignored)"] == 2

    def test_the_odd_lines_of_flickr8k_are_read_and_only_a_line_feed_ends_one(
        self, tmp_path: Path
    ) -> None:
        image(tmp_path / "2258277193_586949ec62.jpg")
        lines = "2258277193_586949ec62.jpg.1#0\tSome\u2028people .\r\n1.JPEG#1\tA\x85dog .\n"
        (tmp_path / "Flickr8k.token.txt").write_text(lines, newline="")
        samples = listed(path=tmp_path / "Flickr8k.token.txt", format="flickr30k")
        assert [(sample.key, sample.captions) for sample in samples] == [
            ("Flickr8k.token/2258277193_586949ec62", {"0": "Some\u2028people ."}),
            ("Flickr8k.token/1", {"0": "A\x85dog ."}),
        ]
        assert [sample.problem for sample in samples] == [0, Status.MISSING_IMAGE]

    def test_captions_per_image_is_a_setting(self, karpathy: Path) -> None:
        first, _ = listed(path=karpathy, format="karpathy", captions_per_image=6)
        assert len(first.captions) == 6


class TestCompositional:
    def test_winoground_names_its_images_without_suffix(self, tmp_path: Path) -> None:
        example = {
            "id": 7,
            "image_0": "ex_7_img_0",
            "image_1": "ex_7_img_1",
            "caption_0": "some plants surrounding a lightbulb",
            "caption_1": "a lightbulb surrounding some plants",
            "tag": "Object",
            "secondary_tag": "",
            "num_main_preds": 1,
            "collapsed_tag": "Object",
        }
        path = tmp_path / "examples.jsonl"
        path.write_text(json.dumps(example) + "\n")
        for number in range(2):
            image(tmp_path / "images" / f"ex_7_img_{number}.png")
        samples = listed(path=path, format="winoground", images=tmp_path / "images")
        assert [(sample.key, sample.group, sample.problem) for sample in samples] == [
            ("examples/0/0", 0, 0),
            ("examples/0/1", 0, 0),
        ]
        assert samples[0].captions == {"0": "some plants surrounding a lightbulb"}
        assert samples[1].captions == {"0": "a lightbulb surrounding some plants"}

    def test_mmvp_pairs_lines_and_says_a_photo_of(self, tmp_path: Path) -> None:
        path = tmp_path / "Questions.csv"
        path.write_text(
            "Question ID,Type,Statement\n"
            "1,Orientation and Direction,a rabbit facing left\n"
            "2,Orientation and Direction,a rabbit facing right\n"
            '3,Texts,"a sign, red"\n4,Texts,a sign\n'
        )
        images = tmp_path / "MLLM_VLM Images"
        for number in (1, 2):
            image(images / "Orientation and Direction" / f"{number}.jpg")
        samples = listed(path=path, format="mmvp", images=images)
        assert [sample.group for sample in samples] == [0, 0, 1, 1]
        assert samples[1].captions == {"0": "a photo of a rabbit facing right"}
        assert samples[2].captions == {"0": "a photo of a sign, red"}
        assert [bool(sample.problem) for sample in samples] == [False, False, True, True]

    def test_sugarcrepe_has_one_image_with_a_right_and_a_wrong_caption(
        self, tmp_path: Path
    ) -> None:
        examples = {
            number: {"filename": "1.jpg", "caption": "right", "negative_caption": "wrong"}
            for number in ("0", "3")  # numbers may be left out, and images come again
        }
        path = tmp_path / "add_att.json"
        path.write_text(json.dumps(examples))
        image(tmp_path / "val2017" / "1.jpg")
        samples = listed(path=path, format="sugarcrepe", images=tmp_path / "val2017")
        assert [(sample.key, sample.group) for sample in samples] == [
            ("add_att/0", 0),
            ("add_att/3", 3),
        ]
        assert all(sample.captions == {"0": "right", "1": "wrong"} for sample in samples)
        assert [sample.problem for sample in samples] == [0, 0]

    def test_aro_is_a_box_of_an_image_with_a_right_and_a_wrong_caption(
        self, tmp_path: Path
    ) -> None:
        samples = listed(path=aro(tmp_path), format="aro", images=tmp_path / "images")
        assert [(sample.key, sample.group, sample.box) for sample in samples] == [
            ("visual_genome_relation/0", 0, (2, 3, 12, 11)),
            ("visual_genome_relation/1", 1, (2, 3, 12, 11)),
            ("visual_genome_relation/2", 2, (0, 0, 40, 5)),
        ]
        assert samples[0].captions == {"0": "the horse eats", "1": "the grass eats"}
        assert [sample.problem for sample in samples] == [0, 0, int(Status.MISSING_IMAGE)]

    @pytest.mark.parametrize(
        "box", [(0, 0, 0, 5), (0, 0, -4, -5), (0, 0, 1 << 14, 1 << 13), (1 << 40, 0, 5, 5)]
    )
    def test_a_box_without_pixels_or_with_far_too_many_is_refused(
        self, tmp_path: Path, box: tuple[int, ...]
    ) -> None:
        path = aro(tmp_path, box)
        with pytest.raises(SourceError, match="example 0 has the box"):
            listed(path=path, format="aro", images=tmp_path / "images")


def aro(folder: Path, box: tuple[float, ...] = (2, 3, 10, 8)) -> Path:
    """Three examples of two images, one of them missing, as in visual_genome_relation.json."""
    image(folder / "images" / "1.jpg")

    def example(name: str, box: tuple[float, ...]) -> dict[str, Any]:
        sides = {f"bbox_{side}": value for side, value in zip("xywh", box, strict=True)}
        captions = {"true_caption": "the horse eats", "false_caption": "the grass eats"}
        return {"image_id": "1", "relation_name": "eats", "image_path": name, **captions, **sides}

    examples = [example("1.jpg", box), example("1.jpg", (2.2, 2.9, 9.6, 8.1))]
    path = folder / "visual_genome_relation.json"
    path.write_text(json.dumps([*examples, example("2.jpg", (0, 0, 40, 5))]))
    return path


FORMATS = ["karpathy", "coco", "flickr30k", "winoground", "mmvp", "sugarcrepe", "aro"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("text", ["{x", '[{"images": 1}]', '{"images": [{}]}', "a\n1,b\n", "\xff"])
def test_a_file_of_another_format_is_refused(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / "file"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(SourceError, match=f"cannot be read as annotations of {name}"):
        listed(path=path, format=name)


def test_an_image_outside_its_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    example = {"filename": "../1.jpg", "caption": "a", "negative_caption": "b"}
    path.write_text(json.dumps({"0": example}))
    with pytest.raises(SourceError, match=r"names the image '\.\./1\.jpg', which is not in"):
        listed(path=path, format="sugarcrepe")


def test_a_name_that_no_file_can_have_is_of_a_missing_image(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    example = {"filename": "1\0.jpg", "caption": "a", "negative_caption": "b"}
    path.write_text(json.dumps({"0": example}))
    (sample,) = listed(path=path, format="sugarcrepe")
    assert sample.problem == Status.MISSING_IMAGE


def test_annotations_that_are_not_there_say_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="The annotations of coco were expected"):
        listed(path=tmp_path / "no.json", format="coco")


def conversation(answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": "<image>\nSay."}, {"from": "gpt", "value": answer}]


AUTHORS: dict[str, tuple[str, dict[str, Any], list[dict[str, str]]]] = {
    "urban1k": (
        "caption/*.txt",
        {"caption/1.txt": "A long street.\n", "caption/2.txt": "A  wall."},
        [{"long": "A long street."}, {"long": "A wall."}],
    ),
    "sharegpt4v": (
        "share.json",
        {"share.json": [{"id": "1", "image": "1.jpg", "conversations": conversation("A\ncat.")}]},
        [{"long": "A cat."}],
    ),
    "docci": (
        "d.jsonlines",
        {
            "d.jsonlines": [
                {"split": s, "image_file": f"{s}.jpg", "description": f"in {s}", "example_id": s}
                for s in ("train", "test")
            ]
        },
        [{"long": "in test"}],
    ),
    "dci": (
        "complete/*.json",
        {
            "complete/sa_1.json": {
                "image": "sa_1.jpg",
                "short_caption": "A cat.",
                "extra_caption": "It sleeps.",
                "mask_data": {},
            }
        },
        [{"short": "A cat.", "long": "A cat.\nIt sleeps."}],
    ),
    "xm3600": (
        "captions.jsonl",
        {
            "captions.jsonl": [
                {
                    "image/key": "0a",
                    "image/locale": "de",
                    "de": {"caption": ["Haus", "Tür"], "caption/tokenized": ["Haus"]},
                    "sw": {"caption": ["nyumba"]},
                }
            ]
        },
        [{"de.0": "Haus", "de.1": "Tür", "sw.0": "nyumba"}],
    ),
    "multi30k": (
        "image_splits/test_2016_flickr.txt",
        {
            "image_splits/test_2016_flickr.txt": "1.jpg\n2.jpg#0\n",
            "raw/test_2016_flickr.en.gz": "A cat.\nA dog.\n",
            "raw/test_2016_flickr.de": "Katze.\nHund.\n",
            "raw/train.de": "Nichts.\n",
        },
        [{"de": "Katze.", "en": "A cat."}, {"de": "Hund.", "en": "A dog."}],
    ),
    "colorswap": (
        "test.json",
        {
            "test.json": [
                {"id": 4, "image_1": "images/1.png", "caption_1": "a", "caption_2": "b"}
                | {"image_2": "images/2.png", "image_source": "dalle"}
            ]
        },
        [{"0": "a"}, {"0": "b"}],
    ),
    "cola": (
        "c.json",
        {"c.json": [["https://x.edu/vg/1.jpg", "a", "https://x.edu/vg/2.jpg", "b"]]},
        [{"0": "a"}, {"0": "b"}],
    ),
}


@pytest.mark.parametrize("form", AUTHORS)
def test_files_of_their_authors_are_read(tmp_path: Path, form: str) -> None:
    pattern, contents, expected = AUTHORS[form]
    for name, content in contents.items():
        text = content if isinstance(content, str) else json.dumps(content)
        if isinstance(content, list) and ".jsonl" in name:
            text = "\n".join(map(json.dumps, content))
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        packed = text.encode()
        path.write_bytes(gzip.compress(packed) if name.endswith(".gz") else packed)
    for name in (
        "1.jpg",
        "2.jpg",
        "test.jpg",
        "sa_1.jpg",
        "0a.jpg",
        "images/1.png",
        "images/2.png",
    ):
        image(tmp_path / "pictures" / name)
    samples = listed(path=tmp_path / pattern, format=form, images=tmp_path / "pictures")
    assert [sample.captions for sample in samples] == expected
    assert [sample.problem for sample in samples] == [0] * len(expected)
    if form in ("colorswap", "cola"):
        assert [sample.group for sample in samples] == [0, 0]


def test_categories_of_their_authors_are_labels(tmp_path: Path) -> None:
    lines = [
        "Question ID,Type,Statement",
        "1,Color,red",
        "2,Color,blue",
        "3,State,up",
        "4,State,on",
    ]
    (tmp_path / "Questions.csv").write_text("\n".join(lines))
    samples = listed(path=tmp_path / "Questions.csv", format="mmvp")
    assert [(sample.group, sample.label_name) for sample in samples] == [
        (0, "Color"),
        (0, "Color"),
        (1, "State"),
        (1, "State"),
    ]
    example = {"0": {"filename": "1.jpg", "caption": "a", "negative_caption": "b"}}
    for name in ("add_att", "swap_obj"):
        (tmp_path / f"{name}.json").write_text(json.dumps(example))
    samples = listed(path=tmp_path / "*.json", format="sugarcrepe")
    assert [(sample.group_name, sample.label_name) for sample in samples] == [
        ("add_att/0", "add_att"),
        ("swap_obj/0", "swap_obj"),
    ]
