"""CIFAR's own binary files: what is read from them, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from features.class_lists import read_class_list
from features.errors import SourceError
from features.images import decode
from features.index import Index, SampleReader, build_index
from features.sources import Source

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


def records(labels: list[list[int]]) -> bytes:
    """Labels, then all red bytes, all green, all blue, as the page of CIFAR describes it."""
    planes = PIXELS.transpose(0, 3, 1, 2)
    return b"".join(
        bytes(head) + pixels.tobytes() for head, pixels in zip(labels, planes, strict=True)
    )


def cifar_10(folder: Path, names: tuple[str, ...] | None = None) -> Path:
    for number in range(1, 6):
        (folder / f"data_batch_{number}.bin").write_bytes(records([[number], [0], [9]]))
    (folder / "test_batch.bin").write_bytes(records([[3], [8], [8]]))
    names = names or read_class_list("cifar-10").classes
    (folder / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    return folder


def cifar_100(folder: Path) -> Path:
    (folder / "train.bin").write_bytes(records([[11, 19], [15, 29], [4, 0]]))
    (folder / "test.bin").write_bytes(records([[10, 49], [0, 33], [14, 72]]))
    names = [name.replace(" ", "_") for name in read_class_list("cifar-100").classes]
    (folder / "fine_label_names.txt").write_text("\n".join(names) + "\n")
    return folder


def index(folder: Path, **settings: Any) -> Index:
    source: Source = TypeAdapter(Source).validate_python(
        {"kind": "cifar", "path": str(folder), **settings}
    )
    return build_index(source.open(), folder / "index.parquet")


def test_the_pixels_and_labels_of_cifar_10_come_back(tmp_path: Path) -> None:
    found = index(cifar_10(tmp_path), split="train")
    assert [sample.key for sample in found.samples()][:4] == [
        "data_batch_1/00000",
        "data_batch_1/00001",
        "data_batch_1/00002",
        "data_batch_2/00000",
    ]
    assert [sample.label for sample in found.samples()][:6] == [1, 0, 9, 2, 0, 9]
    images = SampleReader(found).read(3, 6)
    decoded = [np.asarray(decode(image or b"", max_pixels=1024)) for image in images]
    assert np.array_equal(np.stack(decoded), PIXELS)


def test_the_label_of_cifar_100_is_the_fine_one(tmp_path: Path) -> None:
    found = index(cifar_100(tmp_path), split="test")
    assert [sample.label for sample in found.samples()] == [49, 33, 72]
    assert found.class_names == read_class_list("cifar-100").classes
    image = SampleReader(found).read_row(2) or b""
    assert np.array_equal(np.asarray(decode(image, max_pixels=1024)), PIXELS[2])


def test_names_in_another_order_than_cifars_own_are_refused(tmp_path: Path) -> None:
    names = read_class_list("cifar-10").classes
    cifar_10(tmp_path, (names[1], names[0], *names[2:]))
    with pytest.raises(SourceError, match="names the classes in another order"):
        index(tmp_path, split="test", class_names="cifar-10")


def test_the_pickled_version_is_refused_and_never_opened(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (tmp_path / "batches.meta").write_bytes(b"")
    with pytest.raises(SourceError, match=r"data_batch_1 is pickled.*cifar-10-binary\.tar\.gz"):
        index(tmp_path, split="train")


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = cifar_10(tmp_path) / "test_batch.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SourceError, match=r"has 9218 bytes. Records of 3073 bytes were expected"):
        index(tmp_path, split="test")
