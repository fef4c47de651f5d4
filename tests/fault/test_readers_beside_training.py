"""Search, export and explore beside a training that replaces and removes its checkpoints."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient

from align.checkpoint import Checkpoint, load_head, read_checkpoint
from features.errors import CheckpointError
from features.storage.files import machine
from pipeline.explore.app import Access, create_app
from pipeline.explore.session import Session
from pipeline.export.exports import export_run
from pipeline.export.parts import Parts, parts_of
from pipeline.python import load_aligned
from pipeline.search import search_images
from tests.commands import sail
from tests.trained import trained

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, which is changed by no test."""
    return trained(tmp_path_factory.mktemp("world"))


def replace_best(run: Path) -> None:
    """Do what training does when there is a better head: move the link, remove the folder."""
    best = run / "align" / "best"
    old = best.resolve()
    new = old.with_name(f"step-{int(old.name[5:]) + 1000:08d}")
    shutil.copytree(old, new)
    best.unlink()
    best.symlink_to(new.relative_to(best.parent), target_is_directory=True)
    shutil.rmtree(old)


def test_a_checkpoint_that_goes_while_it_is_read_is_read_from_where_it_is_now(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, symlinks=True)
    expected, _ = load_head(copy / "align" / "best")
    opened, left = Checkpoint.open, [replace_best] * 2

    def open_and_lose(path: Path) -> Checkpoint:
        found = opened(path)
        if left:
            left.pop()(copy)
        return found

    monkeypatch.setattr(Checkpoint, "open", open_and_lose)
    model, checkpoint = load_head(copy / "align" / "best")
    assert checkpoint.path == (copy / "align" / "best").resolve()
    assert torch.equal(model.log_scale, expected.log_scale)
    replace_best(copy)
    assert len(checkpoint.sha256) == 64  # known, though the files are gone


def test_a_checkpoint_that_is_replaced_all_the_time_is_given_up(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, symlinks=True)

    def lose(checkpoint: Checkpoint) -> bytes:
        replace_best(copy)
        return (checkpoint.path / "config.json").read_bytes()

    with pytest.raises(CheckpointError, match="was replaced 10 times while it was read"):
        read_checkpoint(copy / "align" / "best", lose)


def test_an_export_begins_again_where_its_head_was_replaced(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, out = tmp_path / "run", tmp_path / "exported"
    shutil.copytree(run, copy, symlinks=True)
    left = [replace_best]

    def parts_that_go(run: Path, *, with_encoders: bool) -> Parts:
        parts = parts_of(run, with_encoders=with_encoders)
        if left:
            left.pop()(copy)
        return parts

    monkeypatch.setattr("pipeline.export.exports.parts_of", parts_that_go)
    export_run(copy, "hf", out)
    best = copy / "align" / "best" / "model.safetensors"
    assert (out / "model.safetensors").read_bytes() == best.read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def leftover(out: Path) -> Path:
    """Make what a process leaves that was killed while it wrote a folder or file."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    left = out.with_name(f".{out.name}.{machine()}-{process.pid}-0a1b2c3d.partial")
    left.mkdir(parents=True)
    (left / "half.bin").write_bytes(b"half")
    return left


def test_what_killed_commands_left_goes_with_the_next_one(run: Path, tmp_path: Path) -> None:
    queries = tmp_path / "queries.txt"
    queries.write_text("a star\n")
    for name, command in [
        ("e.npy", ("embed", run, "--texts", queries)),
        ("e.zarr", ("embed", run, "--texts", queries)),
        ("o", ("export", run, "--to", "open_clip")),
    ]:
        out = tmp_path / name
        left, others = leftover(out), out.with_name(".mine.partial")
        others.write_text("mine")
        sail(*command, "--out", out)
        assert out.exists()
        assert not left.exists()
        assert others.read_text() == "mine"


def again_and_again(
    work: Callable[[], object], training: subprocess.Popen[str], told: list[str | BaseException]
) -> None:
    """Do some work while a head is trained; note how each time ended."""
    while training.poll() is None:
        try:
            work()
            told.append(work.__name__)
        except BaseException as error:  # noqa: BLE001 - the test tells it
            told.append(error)
            return


def begin_training(recipe: Path, run: Path, features: Path) -> subprocess.Popen[str]:
    """Start a training that writes a checkpoint after every step; return when there is one."""
    settings = [f"run.dir='{run}'", f"run.features='{features}'", "align.epochs=240"]
    settings += ["align.checkpoint_every=1", "align.eval_every=1"]
    command = [sys.executable, "-m", "pipeline.cli", "align", str(recipe)]
    training = subprocess.Popen(
        command + [f"--set={each}" for each in settings],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (run / "align" / "best" / "config.json").exists():
        assert training.poll() is None
    return training


def scale_at(run: Path, step: int) -> float:
    """Return the scale that the log of a training has for a step."""
    lines = (run / "align" / "metrics.jsonl").read_text().splitlines()
    (scale,) = (
        line["scale"] for line in map(json.loads, lines) if line["step"] == step and "scale" in line
    )
    return float(scale)


@pytest.mark.slow
def test_search_export_and_explore_are_right_while_a_head_is_trained(
    run: Path, tmp_path: Path
) -> None:
    trained_now = tmp_path / "run"
    training = begin_training(run.parent / "tiny.toml", trained_now, run)
    page = TestClient(
        create_app(Session(trained_now), Access("127.0.0.1")), base_url="http://127.0.0.1"
    )

    def search() -> None:
        aligned = load_aligned(trained_now)
        hits = search_images(aligned, "test", aligned.encode_text(["a star"]), 3)
        assert [hit.rank for hit in hits] == [1, 2, 3]

    def export() -> None:
        out = export_run(trained_now, "hf", tmp_path / "exported")
        model, checkpoint = load_head(out)
        assert model.scale_and_bias[0] == pytest.approx(scale_at(trained_now, checkpoint.step))

    def explore() -> None:
        for path in ("/api/run", "/api/training", "/api/search?split=test&text=a star"):
            answer = page.get(path)
            assert answer.status_code == 200, (path, answer.status_code, answer.text)

    told: list[str | BaseException] = []
    threads = [
        threading.Thread(target=again_and_again, args=(work, training, told))
        for work in (search, export, explore)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _, errors = training.communicate(timeout=300)
    assert training.returncode == 0, errors
    assert [each for each in told if isinstance(each, BaseException)] == []
    assert min(told.count(name) for name in ("search", "export", "explore")) >= 3
