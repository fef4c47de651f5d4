"""A run is named by its folder, its run file or the name of its recipe, in every command."""

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.commands import sail, the_error_of


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tiny.world(tmp_path).relative_to(tmp_path)


@pytest.mark.slow
def test_the_first_stage_that_is_missing_is_advised(run_file: Path) -> None:
    for command in (("align", run_file), ("eval", run_file)):
        assert "sail extract" in the_error_of(sail(*command, expect=1))
    query = ("search", run_file, "a star")
    error = the_error_of(sail(*query, expect=1))
    assert "nothing was extracted there" in error
    assert error.index("sail extract") < error.index("sail align")
    sail("extract", run_file)
    for stage in (("eval", run_file), query):
        error = the_error_of(sail(*stage, expect=1))
        assert "sail align" in error
        assert "sail extract" not in error


@pytest.mark.slow
def test_every_command_takes_the_run_file_and_the_folder(run_file: Path) -> None:
    sail("extract", run_file)
    folder = Path(json.loads(sail("extract", run_file, "--json").stdout)[0]).parents[1]
    assert sail("extract", folder).stdout == sail("extract", run_file).stdout
    sail("align", folder)
    before = (folder / "align" / "config.toml").read_bytes()
    sail("align", run_file)
    assert (folder / "align" / "config.toml").read_bytes() == before
    for name in (run_file, folder):
        sail("doctor", name)
        hits = json.loads(sail("search", name, "a star", "--top", 1, "--json").stdout)
        assert len(hits) == 1
        sail("eval", name)
        sail("compare", name, folder)
    error = the_error_of(sail("verify", "nothing.toml", expect=1))
    assert "nothing.toml" in error
    stores = sorted(each.name for each in (folder / "features").glob("*.zarr"))
    for name in (run_file, folder):
        if len(stores) == 1:
            assert "is whole" in sail("verify", name).stdout
        else:
            error = the_error_of(sail("verify", name, expect=1))
            assert all(store in error for store in stores)
    moved = folder.rename(folder.with_name("elsewhere"))
    assert str(moved) in sail("align", moved).stdout


def test_the_name_of_a_recipe_is_its_run(run_file: Path) -> None:
    error = the_error_of(sail("search", "sail-small", "a star", expect=1))
    assert "runs/sail-small has no config.toml" in error
    assert "There is no recipe 'deom'" in the_error_of(sail("eval", "deom", expect=1))
