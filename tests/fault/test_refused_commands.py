"""A command that is refused leaves every file as it was, and none that was not there."""

import hashlib
from pathlib import Path

import pytest

from tests import tiny
from tests.commands import sail, the_error_of

Snapshot = dict[str, str]


def snapshot(folder: Path) -> Snapshot:
    """Return every file of a folder with its hash, and every folder in it."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with a run that has gone through all three stages, and things that are refused."""
    folder = tmp_path_factory.mktemp("world")
    run_file = tiny.world(folder, rows=24)
    for stage in ("extract", "align", "eval"):
        sail(stage, run_file)
    tiny.write_tar(folder / "later" / "train-9.tar", tiny.samples(8, first=500))
    (folder / "later" / "broken.tar").write_bytes(b"no tar" * 300)
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("mine")
    (folder / "queries.txt").write_text("a star\n")
    (folder / "junk.bin").write_bytes(b"junk")
    (folder / "empty.pt").write_bytes(b"")
    return folder


SHARDS = ("shards/train-0.tar", "shards/train-1.tar", "later/train-9.tar")
APPENDED = f"data.train.path={[f'FOLDER/{name}' for name in SHARDS]}"
ALIGN_ANEW = ["run.dir='FOLDER/new/run'", "run.features='FOLDER/run'"]
PLACES = {
    "TRAIN": "FOLDER/run/features/train.zarr",
    "TEST": "FOLDER/run/features/test.zarr",
    "SENTENCES": "FOLDER/queries.txt",
}
STAGES = {
    "append with another max_length": (
        "extract --append",
        [APPENDED, "encoders.text.bert.max_length=8"],
        "max_length",
    ),
    "append with another pooling": (
        "extract --append",
        [APPENDED, "encoders.image.vit.pooling=mean"],
        "pooling",
    ),
    "append without the option": ("extract", [APPENDED], "--append"),
    "append, a later split is broken": (
        "extract --append",
        [APPENDED, "data.other={kind='webdataset', path='FOLDER/later/broken.tar'}"],
        "broken.tar",
    ),
    "a new encoder that cannot be loaded": (
        "extract --append",
        [APPENDED, "encoders.text.more={model='FOLDER/notes', pooling='mean'}"],
        "notes",
    ),
    "a new run, its encoder cannot be loaded": (
        "extract",
        ["run.dir='FOLDER/new/run'", "encoders.text.bert.model='FOLDER/notes'"],
        "notes",
    ),
    "a new run, its second source is missing": (
        "extract",
        ["run.dir='FOLDER/new/run'", "data.test.path='FOLDER/nothing-*.tar'"],
        "nothing-",
    ),
    "a new run, its second source is broken": (
        "extract",
        ["run.dir='FOLDER/new/run'", "data.test.path='FOLDER/later/broken.tar'"],
        "broken.tar",
    ),
    "a drawn source beside a broken one": (
        "extract",
        [
            "run.dir='FOLDER/new/run'",
            "data.drawn={kind='scenes', split='train', rows=2}",
            "data.test.path='FOLDER/later/broken.tar'",
        ],
        "broken.tar",
    ),
    "fewer captions": ("extract", ["data.train.captions='long'"], "no longer gives"),
    "features of another run": ("extract", ["run.features='FOLDER/run'"], "run.features"),
    "another seed": ("align", ["run.seed=7"], "seed"),
    "no store": ("align", ["run.dir='FOLDER/new/run'"], "no feature store"),
    "an encoder without a column": (
        "align",
        [
            *ALIGN_ANEW,
            "encoders.image.other={model='FOLDER/vit', pooling='cls'}",
            "align.image=other",
        ],
        "image/other",
    ),
    "a measure without its split": (
        "eval",
        ["eval.knn=['test']", "eval.knn_reference=test"],
        "eval.knn",
    ),
    "prompts by another encoder": (
        "eval",
        ["eval.zero_shot=['test']", "encoders.text.bert.max_length=8"],
        "max_length",
    ),
    "bad prompts of a later split": (
        "eval",
        ["eval.zero_shot=['test', 'train']", "eval.split_templates={train=['a star']}"],
        "no place for the class name",
    ),
    "a check by another encoder": ("eval --check", ["encoders.image.vit.pooling=mean"], "pooling"),
    "no head": ("eval", ["run.dir='FOLDER/new/run'", "run.features='FOLDER/run'"], "no checkpoint"),
    "a sweep that cannot be": ("sweep --over run.seed=1,2", [], "run.seed"),
    "a study of no split": ("study --on nowhere", [], "nowhere"),
    "a study of too few rows": (
        "study",
        ["eval.knn=['test']", "eval.knn_reference=train"],
        "fewer than 10",
    ),
    "a pick of no split": ("pick --on nowhere", [], "nowhere"),
    "a head that is none": (
        "import-head FOLDER/empty.pt",
        ["run.dir='FOLDER/new/run'", "run.features='FOLDER/run'"],
        "empty.pt",
    ),
}
OTHERS = {
    "convert onto a store": ("convert TRAIN --dtype int8 --out TEST", "has keys_sha256"),
    "convert onto a folder": ("convert TRAIN --to hdf5 --out FOLDER/notes", "is a folder"),
    "merge with itself": ("merge TRAIN TRAIN --out FOLDER/new/both.zarr", "key"),
    "merge of what is no store": (
        "merge TRAIN FOLDER/notes --out FOLDER/new/both.zarr",
        "no feature store",
    ),
    "subset of nothing": ("subset TRAIN --query key=nothing --out FOLDER/new/none.zarr", "is left"),
    "subset by no such column": (
        "subset TRAIN --query colour=red --out FOLDER/new/none.zarr",
        "colour",
    ),
    "rechunk onto a store": ("rechunk TRAIN --rows-per-chunk 4 --out TEST", "something at"),
    "reorder like other rows": ("reorder TRAIN --like TEST --out FOLDER/new/o.zarr", "key"),
    "import of junk": ("import-store FOLDER/junk.bin --out FOLDER/new/i.zarr", "junk.bin"),
    "search in no split": ("search FOLDER/run star --split nowhere", "nowhere"),
    "search by no image": ("search FOLDER/run --image FOLDER/junk.bin", "junk.bin"),
    "search in no run": ("search FOLDER/notes star", "config.toml"),
    "embed into no form": ("embed FOLDER/run --texts SENTENCES --out FOLDER/new/e.csv", ".csv"),
    "embed onto a store": (
        "embed FOLDER/run --texts SENTENCES --out TRAIN",
        "no file of embeddings",
    ),
    "embed no images": (
        "embed FOLDER/run --images FOLDER/notes --out FOLDER/new/e.npy",
        "no image",
    ),
    "export onto a folder": ("export FOLDER/run --to hf --out FOLDER/notes", "no exported model"),
    "export in no such form": (
        "export FOLDER/run --to sentence-transformers --out FOLDER/new/st",
        "glu",
    ),
    "export of no run": ("export FOLDER/notes --to hf", "config.toml"),
    "export-head of no such kind": ("export-head FOLDER/run FOLDER/new/head.pt", "glu"),
    "compare what was not measured": ("compare FOLDER/run FOLDER/notes", "notes"),
    "explore no run": ("explore FOLDER/notes --port 0", "config.toml"),
    "verify what is no store": ("verify FOLDER/notes", "no feature store"),
}


@pytest.mark.parametrize("case", list(STAGES))
def test_a_stage_that_is_refused_changes_nothing(case: str, folder: Path) -> None:
    command, overrides, words = STAGES[case]
    name, *options = command.replace("FOLDER", str(folder)).split()
    settings = [f"--set={each.replace('FOLDER', str(folder))}" for each in overrides]
    before = snapshot(folder)
    error = the_error_of(sail(name, *options, folder / "tiny.toml", *settings, expect=1))
    assert words in error
    assert snapshot(folder) == before


@pytest.mark.slow
@pytest.mark.parametrize("case", list(OTHERS))
def test_another_command_that_is_refused_changes_nothing(case: str, folder: Path) -> None:
    command, words = OTHERS[case]
    for name, place in PLACES.items():
        command = command.replace(name, place)
    before = snapshot(folder)
    error = the_error_of(sail(*command.replace("FOLDER", str(folder)).split(), expect=1))
    assert words in error
    assert snapshot(folder) == before
