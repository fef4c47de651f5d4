"""What a training does when: the rate of each update, limits of weights, saves, lines of the log.

Two trainings of one fault are alike, so a resumed one that equals an uninterrupted one proves
nothing of this. Here each is compared with what its settings say.
"""

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from align.checkpoint import Checkpoint
from align.config import AlignConfig
from align.loader import Batch, Loader
from align.trainer import train
from features.errors import StoreCorruptError
from features.store import FeatureStore
from tests.feature_stores import IMAGE, TEXT, make_store

CPU = torch.device("cpu")


def settings(**changes: Any) -> AlignConfig:
    given = {
        "batch_size": 32,
        "steps": 8,
        "holdout": 0.0,
        "memory_mb": 1,
        "start": "random",
        "head": {"dim": 8, "depth": 1},
        **changes,
    }
    return AlignConfig.model_validate(given)


def run(store: FeatureStore, path: Path, config: AlignConfig, **given: Any) -> Path | None:
    options = {"image": IMAGE, "text": TEXT, "device": CPU, "seed": 0, **given}
    return train([store], config, run_dir=path, **options)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return make_store(tmp_path_factory.mktemp("schedule") / "s.zarr")


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def each_update(seen: Callable[[Optimizer], None]) -> Iterator[None]:
    """Call a function with every optimizer right before it changes the weights."""
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: seen(optimizer))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def rates() -> Iterator[list[set[float]]]:
    """Yield a list of the learning rates that each update used, of all groups of weights."""
    used = list[set[float]]()
    with each_update(lambda each: used.append({group["lr"] for group in each.param_groups})):
        yield used


def expected_rates(peak: float, warmup: int, total: int) -> list[float]:
    """A linear rise to the peak, then half a cosine to zero."""
    rise = [peak * step / warmup for step in range(1, warmup + 1)]
    fall = range(total - warmup)
    return rise + [peak * (1 + math.cos(math.pi * i / len(fall))) / 2 for i in fall]


@pytest.mark.parametrize("kind", ["adamw", "lion"])
def test_every_update_uses_the_rate_of_the_schedule(
    store: FeatureStore, tmp_path: Path, kind: str
) -> None:
    optimizer = {"kind": kind, "learning_rate": 0.01, "warmup_fraction": 0.25}
    with rates() as used:
        run(store, tmp_path / "a", settings(steps=12, optimizer=optimizer))
    assert all(len(each) == 1 for each in used)  # of the decayed weights and of the others
    expected = expected_rates(0.01, 3, 12)
    assert [rate for (rate,) in used] == pytest.approx(expected)
    assert [line["learning_rate"] for line in lines(tmp_path / "a")] == pytest.approx(expected)


@pytest.mark.parametrize("stopped_after", [1, 3, 7])
def test_a_resumed_training_goes_on_with_the_rate_of_its_step(
    store: FeatureStore, tmp_path: Path, stopped_after: int
) -> None:
    config = settings(optimizer={"learning_rate": 0.01, "warmup_fraction": 0.25})
    seen = list[int]()
    run(store, tmp_path / "a", config, on_step=lambda step, *_: seen.append(step),
        should_stop=lambda: len(seen) == stopped_after - 1)  # fmt: skip
    assert Checkpoint.open(tmp_path / "a" / "last").step == stopped_after
    with rates() as used:
        run(store, tmp_path / "a", config)
    expected = expected_rates(0.01, 2, 8)
    assert [rate for (rate,) in used] == pytest.approx(expected[stopped_after:])
    assert [line["learning_rate"] for line in lines(tmp_path / "a")] == pytest.approx(expected)


def gradient_norms(store: FeatureStore, path: Path, limit: float | None) -> list[float]:
    """Train, and return the norm over all weights of the gradients that each update used."""
    norms = list[float]()

    def seen(optimizer: Optimizer) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        gradients = [weight.grad.flatten() for weight in weights if weight.grad is not None]
        norms.append(torch.cat(gradients).norm().item())

    with each_update(seen):
        run(store, path, settings(optimizer={"max_grad_norm": limit}))
    return norms


def test_gradients_are_clipped_to_the_greatest_norm(store: FeatureStore, tmp_path: Path) -> None:
    free = gradient_norms(store, tmp_path / "free", None)
    limit = min(free) / 10
    clipped = gradient_norms(store, tmp_path / "clipped", limit)
    assert clipped == pytest.approx([limit] * 8, rel=1e-3)


def test_the_scale_is_held_at_100(store: FeatureStore, tmp_path: Path) -> None:
    config = settings(
        steps=24,
        head={"kind": "linear", "dim": 8},
        loss={"initial_scale": 95.0, "initial_bias": -95.0},  # so low that the scale must rise
        optimizer={"kind": "lion", "learning_rate": 0.01, "warmup_fraction": 0.0},
    )  # Lion moves the logarithm of the scale by the rate, up or down
    run(store, tmp_path / "a", config)
    scales = [line["scale"] for line in lines(tmp_path / "a")]
    assert max(scales) == pytest.approx(100, rel=1e-5)
    assert scales[-4:] == pytest.approx([100] * 4, rel=1e-5)


class Clock:
    """A clock that goes on when it is told to, beside the real one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = 0.0
        for name in ("monotonic", "perf_counter"):
            self._turn(monkeypatch, name)

    def _turn(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        original = getattr(time, name)
        monkeypatch.setattr(time, name, lambda: original() + self.ahead)


def steps_saved(
    store: FeatureStore, path: Path, clock: Clock, *, seconds_per_step: float, steps: int
) -> list[int]:
    """Train while each step takes a time, and return the steps after which `last` is of them."""
    saved = list[int]()

    def on_step(step: int, *_: object) -> None:
        clock.ahead += seconds_per_step
        if (path / "last").exists() and Checkpoint.open(path / "last").step == step:
            saved.append(step)

    run(store, path, settings(steps=steps), on_step=on_step)
    return saved


def test_a_checkpoint_is_written_once_a_minute(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = steps_saved(
        store, tmp_path / "a", Clock(monkeypatch), seconds_per_step=25, steps=12
    )  # a minute is over after the third step of 25 seconds, which the fourth sees
    assert saved == [4, 7, 10, 12]


def test_saving_takes_a_twentieth_of_the_time_at_most(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, waited = Clock(monkeypatch), list[int]()
    original = os.fsync

    def fsync(descriptor: int) -> None:
        waited.append(descriptor)
        clock.ahead += 2.0  # a slow disk
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    saved = steps_saved(store, tmp_path / "a", clock, seconds_per_step=10, steps=120)
    assert len(saved) > 2
    seconds_of_a_save = 2.0 * min(len(waited) // len(saved), 60)
    assert seconds_of_a_save > 6  # or a minute would be longer
    gaps = [10 * (after - before) for before, after in pairwise(saved[:-1])]
    assert all(20 * seconds_of_a_save - 20 <= gap <= 20 * seconds_of_a_save + 100 for gap in gaps)


@pytest.mark.parametrize(("steps", "every"), [(8, 1), (999, 1), (1500, 3), (1_000_000, 50)])
def test_a_line_of_the_log_is_written_some_five_hundred_times_and_every_fifty_steps_at_least(
    store: FeatureStore, tmp_path: Path, steps: int, every: int
) -> None:
    last = 4 * every
    seen = list[int]()
    run(store, tmp_path / "a", settings(steps=steps), on_step=lambda step, *_: seen.append(step),
        should_stop=lambda: len(seen) == last - 1)  # fmt: skip
    logged = [line["step"] for line in lines(tmp_path / "a") if "loss" in line]
    assert logged == list(range(every, last + 1, every))


@pytest.mark.parametrize(
    "changes",
    [{"verify": False}, {"cache_mb": 5}, {"host_memory_mb": 7}, {"cache": "CACHE"}],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_that_do_not_change_the_result_may_change_between_two_runs(
    store: FeatureStore, tmp_path: Path, changes: dict[str, Any]
) -> None:
    changes = {
        name: str(tmp_path / "cache") if value == "CACHE" else value
        for name, value in changes.items()
    }
    run(store, tmp_path / "a", settings(), should_stop=lambda: True)
    run(store, tmp_path / "a", settings(**changes))
    run(store, tmp_path / "b", settings())
    ends = [tmp_path / name / "last" / "model.safetensors" for name in ("a", "b")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_what_is_resumed_without_verify_does_not_look_at_checksums(tmp_path: Path) -> None:
    damaged = make_store(tmp_path / "s.zarr")
    chunk = tmp_path / "s.zarr" / "image" / IMAGE / "features" / "c" / "2" / "0"
    content = bytearray(chunk.read_bytes())
    content[0] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(StoreCorruptError):
        run(damaged, tmp_path / "checked", settings())
    unchecked = settings(verify=False)  # the closed form's pass checks always
    assert run(damaged, tmp_path / "unchecked", unchecked) is not None


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)]
)
def test_held_out_rows_are_scored_in_the_precision_of_the_training(
    store: FeatureStore, tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    scored, trained = set[torch.dtype](), set[torch.dtype]()

    def seen(module: torch.nn.Module, _given: object, output: object) -> None:
        if isinstance(module, torch.nn.Linear) and isinstance(output, torch.Tensor):
            (trained if module.training else scored).add(output.dtype)

    handle = register_module_forward_hook(seen)
    try:
        run(store, tmp_path / "a", settings(holdout=0.2, precision=precision))
    finally:
        handle.remove()
    assert scored == trained == {dtype}


class Killed(BaseException):
    """Stands for SIGKILL: no `except Exception` may catch it."""


def test_a_kill_between_the_links_of_the_last_checkpoint_leaves_the_right_best_one(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, run_dir = os.replace, tmp_path / "a"

    def replace(source: Any, target: Any, **options: Any) -> None:
        last = run_dir / "last"
        if Path(target) == run_dir / "best" and last.exists() and Checkpoint.open(last).step == 8:
            raise Killed
        original(source, target, **options)

    config = settings(checkpoint_every=4)  # without held-out rows, the last is the best
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            run(store, run_dir, config)
    assert Checkpoint.open(run_dir / "best").step == 4
    best = run(store, run_dir, config)
    assert best is not None
    assert Checkpoint.open(best).step == 8
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000008"]


def test_a_checkpoint_is_on_the_disk_before_anything_points_to_it(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, events = tmp_path / "a", list[tuple[str, str]]()

    def name(path: Any) -> str:
        return os.path.relpath(path, run_dir)

    def recorded(call: str) -> None:
        original = getattr(os, call)

        def moved(source: Any, target: Any, **options: Any) -> None:
            events.append((call, f"{name(source)} -> {name(target)}"))
            original(source, target, **options)

        monkeypatch.setattr(os, call, moved)

    original = os.fsync

    def fsync(descriptor: int) -> None:
        events.append(("fsync", name(Path(f"/proc/self/fd/{descriptor}").readlink())))
        original(descriptor)

    recorded("rename")
    recorded("replace")
    monkeypatch.setattr(os, "fsync", fsync)
    run(store, run_dir, settings())

    target = "checkpoints/step-00000008"
    moves = [i for i, (call, what) in enumerate(events) if what.endswith(f"-> {target}")]
    assert len(moves) == 1
    partial = events[moves[0]][1].split(" -> ")[0]
    before, after = events[: moves[0]], events[moves[0] + 1 :]
    files = {path.name for path in (run_dir / target).iterdir()}
    assert len(files) == 3
    assert {("fsync", f"{partial}/{file}") for file in files} | {("fsync", partial)} <= {*before}
    links = [i for i, (call, _) in enumerate(after) if call == "replace"]
    assert ("fsync", "checkpoints") in after[: links[0]]
    assert [after[i][1].split(" -> ")[1] for i in links] == ["last", "best"]
    for i in links:
        assert after[i + 1] == ("fsync", ".")


def test_a_training_that_waits_for_its_data_says_what_would_help(
    store: FeatureStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, original = Clock(monkeypatch), Loader.batches

    def slow(self: Loader, *steps: int) -> Iterator[Batch]:
        for batch in original(self, *steps):
            clock.ahead += 30
            yield batch

    monkeypatch.setattr(Loader, "batches", slow)
    with caplog.at_level("INFO"):
        run(store, tmp_path / "a", settings(steps=4))
    assert re.search(r"waited for its data (100|99|98) % of 1\d\d s\. Raise align", caplog.text)
    caplog.clear()
    monkeypatch.setattr(Loader, "batches", original)
    with caplog.at_level("INFO"):
        run(store, tmp_path / "b", settings(steps=4))
    assert "waited for its data" not in caplog.text
