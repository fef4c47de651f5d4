"""`sail doctor` finds what a run needs, says what is broken, and leaves nothing behind."""

import json
import re
import sys
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.cli import cli
from pipeline.planning import doctor
from pipeline.planning import doctor as machine
from tests import tiny


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SECONDS", 0.05)


def examined(*arguments: str, code: int = 0) -> dict[str, dict[str, str]]:
    done = CliRunner().invoke(cli, ["doctor", *arguments, "--json"])
    assert done.exit_code == code, done.output
    document = json.loads(done.stdout)
    assert document["ok"] == (code == 0)
    return {check["name"]: check for check in document["checks"]}


def test_this_machine_has_what_a_run_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checks = examined()
    assert checks["torch"]["found"] == metadata.version("torch")
    assert "finds the right neighbours" in checks["faiss"]["found"]
    assert "MB/s" in checks["disk"]["found"]
    assert "on one core" in checks["decoding"]["found"]
    assert list(tmp_path.iterdir()) == []


def test_the_table_is_for_people_and_keeps_the_brackets_of_pip(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if "minilm" in name else found(name))
    done = CliRunner().invoke(cli, ["doctor"])
    assert done.exit_code == 0
    assert "pip install -e '.[demo]'" in done.stdout
    assert "Nothing that is needed is broken." in done.stdout


def test_a_recipe_is_looked_at_too(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path)
    checks = examined(str(run_file))
    assert checks["data.train"]["found"] == "2 files"
    assert "encodes: trunk vit (config.json); pooling cls" in checks["image/vit"]["found"]
    for shard in (tmp_path / "shards").glob("test-*.tar"):
        shard.unlink()
    assert "No file matches" in examined(str(run_file), code=1)["data.test"]["found"]
    (tmp_path / "run" / "features" / "test.zarr").mkdir(parents=True)
    assert "feature store is there" in examined(str(run_file))["data.test"]["found"]


def test_a_package_that_is_missing_or_too_old_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor._version
    old = {"zarr": "2.18.0", "obstore": None}
    monkeypatch.setattr(doctor, "_version", lambda name: old.get(name, found(name)))
    checks = examined(code=1)
    assert checks["zarr"]["found"] == "2.18.0"
    assert checks["zarr"]["advice"].startswith("pip install 'zarr")
    assert checks["obstore"]["found"] == "missing"


def add_distribution(folder: Path, name: str) -> None:
    """Let a folder on the path look like an installed distribution with a module faiss."""
    about = folder / f"{name.replace('-', '_')}-1.14.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.14\n")
    (about / "top_level.txt").write_text("faiss\n")


def test_any_build_of_faiss_will_do_two_are_a_warning_and_none_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    add_distribution(tmp_path, "faiss-gpu-cu12")
    two = examined()["faiss"]
    assert two["status"] == "warning"
    assert two["advice"].startswith("pip uninstall faiss-cpu faiss-gpu-cu12")
    alone = {"faiss": ["faiss-gpu-cu12"]}
    monkeypatch.setattr(metadata, "packages_distributions", lambda: alone)
    assert examined()["faiss"]["found"].startswith("faiss-gpu-cu12 1.")
    monkeypatch.setattr(metadata, "packages_distributions", dict)
    assert examined()["faiss"]["found"].startswith("faiss 1.")  # as conda installs it
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert examined(code=1)["faiss"]["status"] == "broken"


def test_the_advice_on_the_gpu_build_does_not_bring_the_other_one_back() -> None:
    advice = examined()["extra gpu"]["advice"]
    assert re.fullmatch(
        r"pip uninstall faiss-cpu && pip install --no-deps 'faiss-gpu>=[\d.]+'", advice
    )


def test_a_faiss_that_finds_other_neighbours_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    import faiss

    assert machine.faiss_finds_neighbours()
    monkeypatch.setattr(faiss, "IndexFlatIP", lambda dim: faiss.IndexLSH(dim, 4))
    assert not machine.faiss_finds_neighbours()
    assert "wrong neighbours" in doctor._faiss().found


def test_a_folder_that_cannot_be_written_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor, "disk_megabytes_per_second", refuse)
    assert "Permission denied" in examined(code=1)["disk"]["found"]


def test_little_room_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(100, 90, 10))
    checks = examined()
    assert checks["free space"]["status"] == checks["/dev/shm"]["status"] == "warning"


def test_a_gpu_that_is_asked_for_and_not_there_is_broken(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path)
    run_file.write_text(run_file.read_text().replace("[run]", '[run]\ndevice = "cuda:63"'))
    check = examined(str(run_file), code=1)["run.device"]
    assert "cuda:63, which is not here" in check["found"]


def test_the_trial_file_is_bounded_and_removed(tmp_path: Path) -> None:
    write, read = machine.disk_megabytes_per_second(tmp_path, seconds=9, megabytes=20)
    assert write > 0
    assert read > 0
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_is_looked_at_as_its_overrides_make_it(tmp_path: Path) -> None:
    run_file = str(tiny.world(tmp_path))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert f"at {elsewhere}" in examined(run_file, "--set", f"run.dir={elsewhere}")["disk"]["found"]
    done = CliRunner().invoke(cli, ["doctor", "--set", "run.dir=x"])
    assert (done.exit_code, "name it" in done.stderr) == (2, True)
