"""`sail align` on stores that cannot be trained on: one line that says why, and exit 1."""

from collections.abc import Callable
from pathlib import Path

import pytest
import zarr
from click.testing import CliRunner, Result

from features.store import FeatureStore
from pipeline.cli import cli
from tests.commands import sail
from tests.feature_stores import IMAGE, TEXT, as_version_1, make_store, on_disk

RECIPE = f"""
[run]
device = "cpu"
[data.train]
kind = "folder"
path = "train.jsonl"
[data.more]
kind = "folder"
path = "more.jsonl"
[encoders.image.{IMAGE}]
model = "none"
[encoders.text.{TEXT}]
model = "none"
[align]
batch_size = 32
steps = 3
memory_mb = 1
head = {{ kind = "linear", dim = 8 }}
"""


def align(folder: Path, *overrides: str) -> Result:
    """Type `sail align` for a run in a folder."""
    (folder / "run.toml").write_text(RECIPE)
    options = [each for override in overrides for each in ("--set", f"align.{override}")]
    place = ["--set", f"run.dir={folder / 'run'}"]
    return CliRunner().invoke(cli, ["align", str(folder / "run.toml"), *place, *options])


def store_of(folder: Path, split: str, **options: object) -> FeatureStore:
    (folder / "run" / "features").mkdir(parents=True, exist_ok=True)
    path = folder / "run" / "features" / f"{split}.zarr"
    return make_store(path, **options)  # type: ignore[arg-type]


def refused(result: Result, *words: str) -> None:
    """Check that the command failed with one line that has some words in their order."""
    assert result.exit_code == 1, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert "Traceback" not in result.stderr
    rest = errors[0]
    for word in words:
        assert word in rest
        rest = rest.partition(word)[2]


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_a_bit, "its crc32c does not match its bytes"),
        (cut_off, "bytes, not"),
        (Path.unlink, "the file is missing although its rows are done"),
    ],
)
def test_a_damaged_chunk_is_named(
    tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    column = store_of(tmp_path, "train").column(f"text/{TEXT}/long")
    damage(on_disk(column.features_file(5)))
    refused(align(tmp_path), "text/reader/long/features/c/5/0 is damaged: ", words)


def test_a_flipped_bit_is_not_looked_for_if_the_settings_say_so(tmp_path: Path) -> None:
    column = store_of(tmp_path, "train").column(f"image/{IMAGE}")
    flip_a_bit(on_disk(column.features_file(5)))
    assert align(tmp_path, "verify=false", "holdout=0", "start=random").exit_code == 0


def test_stores_in_another_order_are_refused_by_the_first_key_and_joined_when_reordered(
    tmp_path: Path,
) -> None:
    images = store_of(tmp_path, "train")
    texts = make_store(tmp_path / "texts.zarr")
    group = zarr.open_group(tmp_path / "texts.zarr", mode="r+")
    keys = texts.keys()
    keys[[3, 4]] = keys[[4, 3]]
    group["key"][:] = keys  # type: ignore[index]
    group.attrs["keys_sha256"] = "0" * 64
    as_version_1(tmp_path / "texts.zarr")
    refused(
        align(tmp_path, f"text_store={tmp_path / 'texts.zarr'}"),
        "have not the same rows: row 3 is 'shard/000003' in the one",
        "'shard/000004' in the other",
        (advised := f"sail reorder {tmp_path / 'texts.zarr'} --like {images.path} --out "),
    )
    sail(*advised.split()[1:], tmp_path / "joined.zarr")
    assert align(tmp_path, f"text_store={tmp_path / 'joined.zarr'}").exit_code == 0
    joined = FeatureStore.open(tmp_path / "joined.zarr")
    assert joined.captions("bare", 3, 5).tolist() == ["bare of 4", "bare of 3"]


def test_a_column_of_another_width_is_refused(tmp_path: Path) -> None:
    store_of(tmp_path, "train")
    store_of(tmp_path, "more", text_dim=7)
    refused(
        align(tmp_path, "mix={train = 1.0, more = 1.0}"),
        "more.zarr/text/reader/bare has dim = 7, but",
        "has 10",
    )


def test_a_caption_field_of_another_width_is_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path, "train")
    wider = make_store(tmp_path / "wider.zarr", text_dim=11)
    field = on_disk(wider.path) / "text" / TEXT / "long"
    target = on_disk(store.path) / "text" / TEXT / "long"
    target.rename(tmp_path / "long")
    field.rename(target)
    as_version_1(on_disk(store.path))
    refused(align(tmp_path), "text/reader/long has dim = 11, but", "text/reader/bare has 10")


def test_a_store_without_rows_is_refused(tmp_path: Path) -> None:
    store_of(tmp_path, "train", rows=0)
    refused(align(tmp_path), "No row of", "train.zarr", "expected")


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 20])
def test_a_store_with_few_rows_is_trained_on(tmp_path: Path, rows: int) -> None:
    store_of(tmp_path, "train", rows=rows)
    assert align(tmp_path, "holdout=0").exit_code == 0


def test_a_split_without_a_store_and_an_unknown_one_are_refused(tmp_path: Path) -> None:
    store_of(tmp_path, "train")
    refused(align(tmp_path, "mix={train = 1.0, more = 1.0}"), "no feature store at", "more.zarr")
    refused(align(tmp_path, "mix={other = 1.0}"), "align.mix names the split 'other'", "'train'")


def test_one_store_for_several_splits_is_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path, "train")
    store_of(tmp_path, "more")
    result = align(tmp_path, "mix={train = 1.0, more = 1.0}", f"store={store.path}")
    refused(
        result, "is one store, but align.mix has the splits ['train', 'more']", "folder of a run"
    )


def test_a_mixture_and_the_store_of_another_run_are_trained_on(tmp_path: Path) -> None:
    store_of(tmp_path, "train", seed=1)
    store_of(tmp_path, "more", seed=2)
    both = align(tmp_path, "mix={train = 1.0, more = 2.0}")
    assert both.exit_code == 0, both.output
    other = tmp_path / "other"
    other.mkdir()
    result = align(other, f"store={tmp_path / 'run'}")
    assert result.exit_code == 0, result.output
