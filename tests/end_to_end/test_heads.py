"""Released heads in and out of a run, by the commands that a user types."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from align.checkpoint import load_head
from align.heads import build_model
from pipeline.cli import cli
from pipeline.export.released import save_released
from tests import tiny


def sail(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file whose features are there."""
    run_file = tiny.world(tmp_path_factory.mktemp("world"), rows=40)
    assert sail("extract", run_file).exit_code == 0
    return run_file


def head(path: Path, *, image_dim: int = 16, text_dim: int = 12) -> Path:
    torch.manual_seed(0)
    settings = {"kind": "star", "dim": 6, "expansion": 2}
    model = build_model(settings, image_dim=image_dim, text_dim=text_dim)
    save_released(model, "star", path, epoch=0)
    return path


def test_an_imported_head_is_evaluated_and_exported_as_it_came(
    run_file: Path, tmp_path: Path
) -> None:
    file = head(tmp_path / "released.pt")
    places = ["--set", f"run.dir='{tmp_path}'"]
    places += ["--set", f"run.features='{run_file.parent / 'run'}'"]
    imported = sail("import-head", file, run_file, *places)
    assert imported.exit_code == 0, imported.output
    model, checkpoint = load_head(tmp_path / "align" / "best")
    assert checkpoint.run["imported"]["file"] == "released.pt"
    assert sail("eval", run_file, *places).exit_code == 0
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert results["checkpoint_sha256"] == checkpoint.sha256
    exported = sail("export-head", tmp_path, tmp_path / "again.pt")
    assert exported.exit_code == 0, exported.output
    first, again = (torch.load(path, weights_only=True) for path in (file, tmp_path / "again.pt"))
    assert all(
        torch.equal(first["state_dict"][k], again["state_dict"][k]) for k in again["state_dict"]
    )
    second = sail("import-head", file, run_file, *places)
    assert second.exit_code == 1
    assert "has a head already" in second.output
    trained = sail(
        "align", run_file, *places, "--set", "align.head={kind='star', dim=6, expansion=2}"
    )
    assert trained.exit_code == 1
    assert "was trained with imported" in trained.output
    assert model.log_scale.item() == first["state_dict"]["logit_scale"].item()


def test_a_head_for_features_of_another_length_is_refused(run_file: Path, tmp_path: Path) -> None:
    file = head(tmp_path / "released.pt", image_dim=13)
    refused = sail("import-head", file, run_file)
    assert refused.exit_code == 1
    assert "takes features of length 13" in refused.output
    assert "has 16" in refused.output


def test_a_trained_stack_of_gated_layers_is_exported_but_not_in_the_released_layout(
    run_file: Path, tmp_path: Path
) -> None:
    places = ["--set", f"run.dir='{tmp_path}'"]
    places += ["--set", f"run.features='{run_file.parent / 'run'}'"]
    assert sail("align", run_file, *places).exit_code == 0
    exported, about = load_head(tmp_path / "model")
    best, checkpoint = load_head(tmp_path / "align" / "best")
    assert about.sha256 == checkpoint.sha256
    assert all(map(torch.equal, exported.state_dict().values(), best.state_dict().values()))
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert checkpoint.sha256 in card
    assert "vit: " in card
    refused = sail("export-head", tmp_path, tmp_path / "out.pt")
    assert refused.exit_code == 1
    assert "'glu' has no place in the released layout" in refused.output
    assert not (tmp_path / "out.pt").exists()


def test_a_head_is_imported_and_measured_on_the_stores_that_the_recipe_names(
    run_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    features = run_file.parent / "run" / "features"
    for kind, other in (("image", "text"), ("text", "image")):
        shutil.copytree(features, tmp_path / kind / "features")
        for store in (tmp_path / kind / "features").glob("*.zarr"):
            for encoder in (store / other).glob("*/"):
                shutil.rmtree(encoder)
    own = [f"run.dir='{tmp_path / 'own'}'", f"run.features='{features.parent}'"]
    named = [f"run.dir='{tmp_path / 'named'}'", f"align.store='{tmp_path / 'image'}'"]
    named += [f"align.text_store='{tmp_path / 'text'}'"]
    file = head(tmp_path / "released.pt")
    results = []
    for settings in (own, named):
        places = [f"--set={setting}" for setting in settings]
        for command in (["import-head", file], ["eval"]):
            done = sail(*command, run_file, *places)
            assert done.exit_code == 0, done.output
        folder = tmp_path / ("own" if settings is own else "named")
        results.append(json.loads((folder / "eval" / "results.json").read_text())["results"])
    assert results[0] == results[1] != []
    measures = 3  # of which each says once that the run has no index to find pictures by
    assert caplog.text.count("The report shows no pictures of test: ") == measures
