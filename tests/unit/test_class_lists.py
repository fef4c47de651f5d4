"""Class names: lists that ship with the program, and how a wrong order is noticed."""

import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from evaluate.measures import EvalConfig
from evaluate.measures.segmentation import SegmentationSettings
from evaluate.segmentation_sets import SEGMENTATION_SETS
from features.class_lists import CLASS_LISTS, FOLDER, check_order, read_class_list
from features.errors import SourceError
from features.sources import Source
from tests import tiny

CIFAR = read_class_list("cifar-10").classes


def class_names(**settings: Any) -> tuple[str, ...] | None:
    """The names of the classes of a source given as in a run file."""
    source: Source = TypeAdapter(Source).validate_python(settings)
    return source.open().class_names()


def folders(root: Path, names: tuple[str, ...]) -> dict[str, Any]:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "1.jpg").write_bytes(tiny.encoded(tiny.picture(0)))
    return {"kind": "classes", "path": str(root)}


def parquet(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """A file as Hugging Face datasets write it: images as structs, names of labels beside."""
    image = pa.array([{"bytes": tiny.encoded(tiny.picture(0)), "path": "0.jpg"}])
    features = {"label": {"names": list(names), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"image": image, "label": pa.array([0], pa.int64())})
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return {"kind": "parquet", "path": str(path)}


@pytest.mark.parametrize("name", CLASS_LISTS)
def test_a_list_is_whole_and_says_where_it_is_from(name: str) -> None:
    found = read_class_list(name)
    document = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert len(found.classes) == len(found.folders or found.classes) >= 10
    assert len(set(found.folders or found.classes)) == len(found.classes)
    assert found.templates
    assert all(template.count("{}") == 1 for template in found.templates)
    for source in document["source"]:
        assert set(source) == {"repository", "file", "commit", "sha256", "licence"}


def test_the_lists_have_the_sizes_of_their_data_sets() -> None:
    assert {name: len(read_class_list(name).classes) for name in CLASS_LISTS} == {
        "caltech-101": 102,  # with the background, as the data set's own folders
        "cifar-10": 10,
        "cifar-100": 100,
        "dtd": 47,
        "fgvc-aircraft": 100,
        "flowers-102": 102,
        "food-101": 101,
        "imagenet-1k": 1000,
        "imagenet-a": 200,
        "imagenet-r": 200,
        "imagenet-v2": 1000,
        "oxford-pets": 37,
        "stanford-cars": 196,
        "sun397": 397,
    }
    assert len(read_class_list("imagenet-1k").templates) == 80


def test_a_part_of_imagenet_has_the_names_of_the_same_folders() -> None:
    whole = read_class_list("imagenet-1k")
    names = dict(zip(whole.folders or (), whole.classes, strict=True))
    for part in map(read_class_list, ("imagenet-a", "imagenet-r")):
        assert part.classes == tuple(names[folder] for folder in part.folders or ())


def test_folders_are_named_by_their_names_and_not_by_their_order(tmp_path: Path) -> None:
    # Sorted as text, the folders of ImageNet-V2 are 0, 1, 10, 100, …: their order names nothing.
    found = read_class_list("imagenet-v2")
    source = folders(tmp_path, tuple(map(str, range(1000))))
    names = class_names(**source, names="imagenet-v2")
    assert names is not None
    assert names[2] == found.classes[10]
    assert names[3] == found.classes[100]


def test_folders_may_be_spelled_with_underscores(tmp_path: Path) -> None:
    source = folders(tmp_path, tuple(name.replace(" ", "_") for name in CIFAR))
    assert class_names(**source, names="cifar-10") == CIFAR


def test_folders_of_another_data_set_are_refused(tmp_path: Path) -> None:
    source = folders(tmp_path, CIFAR)
    (tmp_path / "boat").mkdir()
    (tmp_path / "boat" / "1.jpg").write_bytes(b"")
    with pytest.raises(SourceError, match=r"1 are none of its 10 classes \['boat'\]"):
        class_names(**source, names="cifar-10")


def test_a_part_of_the_folders_keeps_its_names_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = folders(tmp_path, CIFAR)
    shutil.rmtree(tmp_path / "ship")
    assert class_names(**source, names="cifar-10") == tuple(n for n in CIFAR if n != "ship")
    assert "9 of the 10 classes of cifar-10; none for ['ship']" in caplog.text


def test_a_parquet_file_of_hugging_face_names_its_own_labels(tmp_path: Path) -> None:
    assert class_names(**parquet(tmp_path / "p.parquet", CIFAR)) == CIFAR


def test_names_in_another_order_than_the_files_own_are_refused(tmp_path: Path) -> None:
    swapped = (CIFAR[1], CIFAR[0], *CIFAR[2:])
    source = parquet(tmp_path / "p.parquet", swapped)
    with pytest.raises(SourceError, match="names the classes in another order"):
        class_names(**source, class_names="cifar-10")
    own = tmp_path / "names.txt"
    own.write_text("\n".join(swapped), encoding="utf-8-sig")
    assert class_names(**source, class_names=str(own)) == swapped


@pytest.mark.parametrize("folder", ["", "test"])
def test_names_in_another_order_than_those_beside_the_tars_are_refused(
    tmp_path: Path, folder: str
) -> None:
    shard = tiny.write_tar(tmp_path / folder / "0.tar", tiny.samples(1))
    source = {"kind": "webdataset", "path": str(shard), "class_names": "cifar-10"}
    assert class_names(**source) == CIFAR
    (tmp_path / "classnames.txt").write_text("\n".join(CIFAR))
    assert class_names(**source) == CIFAR
    (tmp_path / "classnames.txt").write_text("\n".join(reversed(CIFAR)))
    with pytest.raises(SourceError, match=r"another order than .*classnames\.txt"):
        class_names(**source)


def test_another_number_of_names_than_the_files_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"names 100 classes, but .* has 10"):
        class_names(**parquet(tmp_path / "p.parquet", CIFAR), class_names="cifar-100")


def test_names_that_are_only_worded_differently_pass() -> None:
    own = ("tench, Tinca tinca", "crane", "crane", "cock")
    given = ("Tench", "construction crane", "crane", "rooster")
    check_order(given, own, given_by="a", own_by="b")


def test_the_page_of_data_sets_has_only_lines_that_a_run_file_takes() -> None:
    page = (FOLDER.parents[1] / "docs" / "datasets.md").read_text(encoding="utf-8")
    blocks = [tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", page, re.DOTALL)]
    sources = [source for block in blocks for source in block.get("data", {}).values()]
    for source in sources:
        TypeAdapter(Source).validate_python(source)
    evaluated = [EvalConfig(**block["eval"]) for block in blocks if "eval" in block]
    sets = {name for each in evaluated for name in each.of(SegmentationSettings).segmentation}
    assert sets == set(SEGMENTATION_SETS)
    assert len(sources) >= 12
    for name in CLASS_LISTS:
        assert f"`{name}`" in page
