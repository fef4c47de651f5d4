"""Each stage keeps the settings it ran with; those of one change nothing of another's."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from align.checkpoint import MODEL, STATE, Checkpoint, CheckpointFolder, Snapshot
from pipeline.interrupt import StopRequest
from pipeline.python import load_aligned, open_run
from pipeline.run.align import align_run
from pipeline.run.config import load_config
from tests import tiny
from tests.commands import sail, the_error_of
from tests.trained import trained

CHANGED = ["align.epochs=6", "align.eval_every=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose best head is not its last one, as with more rows held out."""
    run = trained(tmp_path_factory.mktemp("world"), *CHANGED)
    checkpoints = CheckpointFolder(run / "align")
    last = Checkpoint.open(checkpoints.last)
    written = {"format", "format_version", "sha256"}
    about = {name: each for name, each in last.metadata.items() if name not in written}
    about["best_step"] = 1
    weights = last.tensors(MODEL)
    others = {name: 1.5 * each for name, each in weights.items()}
    best = Snapshot(1, others, about | {"step": 1})
    checkpoints.save(Snapshot(last.step, weights, about), last.tensors(STATE), best)
    align_run(load_config(str(run.parent / "tiny.toml"), CHANGED), StopRequest())
    assert (run / "align" / "best").resolve() != (run / "align" / "last").resolve()
    return run


@pytest.fixture
def recipe(run: Path) -> list[object]:
    """The run file as the run was made by it."""
    return [run.parent / "tiny.toml", *(f"--set={each}" for each in CHANGED)]


def config_of(run: Path) -> bytes:
    return (run / "config.toml").read_bytes()


def test_an_evaluation_of_another_checkpoint_is_not_handed_over(
    run: Path, recipe: list[object]
) -> None:
    before = config_of(run)
    vector = load_aligned(run).encode_text(["a star"])
    sail("eval", *recipe, "--set=eval.checkpoint=last")
    assert config_of(run) == before
    assert 'checkpoint = "last"' in (run / "eval" / "config.toml").read_text()
    found = load_aligned(run)
    assert found.checkpoint.path == (run / "align" / "best").resolve()
    np.testing.assert_array_equal(found.encode_text(["a star"]), vector)
    sail("export", run, "--to", "open_clip", "--out", run.parent / "exported")
    card = (run.parent / "exported" / "README.md").read_text()
    assert f"step {found.checkpoint.step}," in card


def test_settings_of_an_encoder_given_to_a_later_stage_change_no_embedding(
    run: Path, recipe: list[object], tmp_path: Path
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.jpg").write_bytes(tiny.encoded(tiny.picture(3)))
    sail("embed", run, "--images", pictures, "--out", tmp_path / "before.npy")
    for command in ("eval", "align"):
        sail(command, *recipe, "--set=encoders.image.vit.mode=fast")
        sail("embed", run, "--images", pictures, "--out", tmp_path / "after.npy")
        assert (tmp_path / "after.npy").read_bytes() == (tmp_path / "before.npy").read_bytes()
    assert 'mode = "fast"' in (run / "align" / "config.toml").read_text()
    assert open_run(run).encoders.image["vit"].mode == "exact"


def test_align_is_the_command_that_says_which_head_is_handed_over(
    run: Path, recipe: list[object]
) -> None:
    sail("align", *recipe, "--set=eval.checkpoint=last")
    assert load_aligned(run).checkpoint.path == (run / "align" / "last").resolve()
    sail("align", *recipe)
    assert load_aligned(run).checkpoint.path == (run / "align" / "best").resolve()


def test_a_split_that_is_extracted_later_can_be_searched(run: Path, recipe: list[object]) -> None:
    source = f"data.more={{kind='webdataset', path='{run.parent}/shards/test-0.tar'}}"
    sail("extract", *recipe, f"--set={source}")
    assert "more" in open_run(run).data
    assert len(json.loads(sail("search", run, "a star", "--split", "more", "--json").stdout)) == 10


@pytest.mark.parametrize("stage", ["features", "align"])
def test_kept_settings_that_were_damaged_are_refused(
    run: Path, recipe: list[object], stage: str
) -> None:
    command, kept = {"features": "extract"}.get(stage, stage), run / stage / "config.toml"
    sail(command, *recipe)
    whole = kept.read_text()
    for damaged in (whole.replace("upright = false", "upright = true", 1), whole[:-200]):
        assert damaged != whole
        kept.write_text(damaged)
        error = the_error_of(sail("search", run, "a star", expect=1))
        assert f"{kept} is not as the stage left it: its crc32c is " in error
    sail(command, *recipe)  # which knows what is right
    assert kept.read_text() == whole
    kept.write_text(whole.partition("\n")[2].replace("upright = false", "upright = true", 1))
    assert load_config(str(kept)).encoders.image["vit"].upright  # it was meant
    kept.write_text(whole)


def test_a_run_of_an_earlier_version_is_used_as_before(run: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(run, old, symlinks=True)
    for stage in ("features", "align", "eval"):
        (old / stage / "config.toml").unlink(missing_ok=True)
    now, before = load_aligned(run), load_aligned(old)
    assert before.checkpoint.sha256 == now.checkpoint.sha256
    assert before.config.encoders == now.config.encoders
    assert before.config.data.keys() == now.config.data.keys()
