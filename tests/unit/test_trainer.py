"""A training learns, chooses its best step, writes down how it went, and refuses what cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from align.checkpoint import Checkpoint, load_head
from align.config import AlignConfig
from align.trainer import train
from features.errors import CheckpointError, TrainingError
from features.store import FeatureStore
from tests import tiny
from tests.feature_stores import IMAGE, TEXT, make_store
from tests.trainings import spoil

CPU = torch.device("cpu")


def settings(**changes: Any) -> AlignConfig:
    given = {
        "batch_size": 32,
        "steps": 8,
        "holdout": 0.2,
        "memory_mb": 1,
        "start": "random",
        "head": {"dim": 8, "depth": 2},
        **changes,
    }
    return AlignConfig.model_validate(given)


def run(store: FeatureStore, path: Path, config: AlignConfig, **given: Any) -> Path | None:
    options = {"image": IMAGE, "text": TEXT, "device": CPU, "seed": 0, **given}
    return train([store], config, run_dir=path, **options)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return make_store(tmp_path / "s.zarr", bad_images=(2,), bad_captions=((5, 0), (6, 1)))


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", tiny.TRAINED_HEADS)
@pytest.mark.parametrize("loss", ["sigmoid", "infonce"])
def test_every_head_learns_with_every_loss(
    store: FeatureStore, tmp_path: Path, kind: str, loss: str
) -> None:
    config = settings(
        steps=50,
        eval_every=50,
        head={"kind": kind, "dim": 8, "depth": 2},
        loss={"kind": loss},
        optimizer={"learning_rate": 0.02},
    )
    best = run(store, tmp_path / "a", config)
    assert best is not None
    _, checkpoint = load_head(best)
    assert checkpoint.heldout["recall@10"] > 0.6  # chance is 10 of about 40


@pytest.mark.parametrize("positives", ["own", "identical"])
def test_lion_learns(store: FeatureStore, tmp_path: Path, positives: str) -> None:
    config = settings(
        steps=60,
        optimizer={"kind": "lion", "learning_rate": 3e-3, "beta2": 0.99},
        loss={"positives": positives},
    )
    best = run(store, tmp_path / "a", config)
    assert best is not None
    assert load_head(best)[1].heldout["recall@10"] > 0.6


def scored(path: Path) -> dict[float, dict[str, float]]:
    return {line["step"]: line for line in lines(path) if "heldout/log_rank" in line}


def test_the_best_checkpoint_is_the_last_as_good_as_that_of_the_lowest_rank(
    tmp_path: Path,
) -> None:
    store = make_store(tmp_path / "s.zarr", rows=400)
    config = settings(steps=30, eval_every=2)
    run(store, tmp_path / "a", config)
    ranks = {step: line["heldout/log_rank"] for step, line in scored(tmp_path / "a").items()}
    lowest = min(ranks, key=lambda step: ranks[step])
    best = Checkpoint.open(tmp_path / "a" / "best")
    assert best.step >= lowest
    error = best.heldout["log_rank_se"]  # of one head; that of the difference is smaller
    assert ranks[best.step] <= ranks[lowest] + error
    assert best.heldout["log_rank"] == ranks[best.step]
    assert Checkpoint.open(tmp_path / "a" / "last").step == 30


def test_steps_that_spoil_the_head_are_not_chosen_also_after_a_resume(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", rows=400)
    fast = {"learning_rate": 1.0, "warmup_fraction": 0.0}
    config = settings(steps=6, eval_every=1, start="cca", optimizer=fast)
    run(store, tmp_path / "a", config, should_stop=lambda: True)
    run(store, tmp_path / "a", config)
    ranks = {step: line["heldout/log_rank"] for step, line in scored(tmp_path / "a").items()}
    assert list(ranks) == list(range(7))
    assert min(ranks, key=lambda step: ranks[step]) == 0
    assert Checkpoint.open(tmp_path / "a" / "best").step == 0


def test_a_batch_is_no_larger_than_the_data(
    store: FeatureStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(store, tmp_path / "a", settings(batch_size=500, steps=1))
    assert "align.batch_size = 500 is more than the 154 rows to train on: lowered" in caplog.text
    assert Checkpoint.open(tmp_path / "a" / "last").run["align"]["batch_size"] == 154


def test_without_held_out_rows_the_best_checkpoint_is_the_last(
    store: FeatureStore, tmp_path: Path
) -> None:
    best = run(store, tmp_path / "a", settings(holdout=0.0))
    assert best is not None
    assert Checkpoint.open(best).step == 8


def test_metrics_are_one_json_object_per_step_with_units(
    store: FeatureStore, tmp_path: Path
) -> None:
    run(store, tmp_path / "a", settings(eval_every=4, start="cca"))
    training = [line for line in lines(tmp_path / "a") if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 9))
    expected = {"step", "epoch", "loss", "learning_rate", "scale", "bias"}
    assert set(training[0]) == expected | {"images_per_second", "wait_for_data_seconds"}
    heldout = [line for line in lines(tmp_path / "a") if "heldout/recall@10" in line]
    assert [line["step"] for line in heldout] == [0, 4, 8]  # the closed form first
    assert list((tmp_path / "a" / "tensorboard").glob("events*"))


def test_every_step_is_told(store: FeatureStore, tmp_path: Path) -> None:
    told = list[tuple[int, int]]()
    run(
        store, tmp_path / "a", settings(), on_step=lambda step, total, _: told.append((step, total))
    )
    assert told == [(step, 8) for step in range(1, 9)]


def test_epochs_become_whole_steps(store: FeatureStore, tmp_path: Path) -> None:
    run(store, tmp_path / "a", settings(steps=None, epochs=1.5))
    last = Checkpoint.open(tmp_path / "a" / "last")
    assert (last.step, last.metadata["total_steps"]) == (6, 6)  # four batches of 32 in an epoch


def test_a_finished_run_returns_at_once(store: FeatureStore, tmp_path: Path) -> None:
    steps = list[int]()
    first = run(store, tmp_path / "a", settings())
    again = run(store, tmp_path / "a", settings(), on_step=lambda step, *_: steps.append(step))
    assert (again, steps) == (first, [])


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_to_the_same_end(
    store: FeatureStore, tmp_path: Path
) -> None:
    config = settings(head={"dim": 8, "depth": 2, "dropout": 0.2}, captions_per_image=1)
    seen = list[int]()

    def on_step(step: int, _total: int, _note: str) -> None:
        seen.append(step)

    assert run(store, tmp_path / "a", config, should_stop=lambda: len(seen) == 2,
               on_step=on_step) is None  # fmt: skip
    assert Checkpoint.open(tmp_path / "a" / "last").step == 3
    assert run(store, tmp_path / "a", config, on_step=on_step) is not None
    assert seen == list(range(1, 9))
    run(store, tmp_path / "b", config)
    for name in ("last", "best"):
        for file in ("model.safetensors", "config.json"):
            resumed, whole = (tmp_path / run_dir / name / file for run_dir in ("a", "b"))
            assert resumed.read_bytes() == whole.read_bytes()


def test_a_resumed_run_has_the_metrics_of_an_uninterrupted_one(
    store: FeatureStore, tmp_path: Path
) -> None:
    config = settings(eval_every=2, checkpoint_every=3)
    steps = list[int]()
    run(store, tmp_path / "a", config, should_stop=lambda: len(steps) == 4,
        on_step=lambda step, _total, _note: steps.append(step))  # fmt: skip
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 1.0}\n{"step": 7, "lo')  # after the checkpoint, and torn
    run(store, tmp_path / "a", config)
    run(store, tmp_path / "b", config)

    def without_times(path: Path) -> list[dict[str, float]]:
        times = {"images_per_second", "wait_for_data_seconds"}
        return [{k: v for k, v in line.items() if k not in times} for line in lines(path)]

    assert without_times(tmp_path / "a") == without_times(tmp_path / "b")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"optimizer": {"learning_rate": 0.5}}, r"align\.optimizer\.learning_rate = 0\.001"),
        ({"steps": 9}, r"align\.steps = 8"),
        ({"memory_mb": 2}, r"align\.memory_mb = 1"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_by_their_name(
    store: FeatureStore, tmp_path: Path, changes: dict[str, Any], name: str
) -> None:
    run(store, tmp_path / "a", settings())
    with pytest.raises(CheckpointError, match=f"was trained with {name}"):
        run(store, tmp_path / "a", settings(**changes))


def test_a_checkpoint_of_another_store_or_seed_is_refused(
    store: FeatureStore, tmp_path: Path
) -> None:
    run(store, tmp_path / "a", settings())
    with pytest.raises(CheckpointError, match="seed = 0, but this run has 1"):
        run(store, tmp_path / "a", settings(), seed=1)
    grown = make_store(tmp_path / "grown.zarr", rows=210)
    with pytest.raises(CheckpointError, match=r"store\.rows = 200, but this run has 210\. .*grew"):
        run(grown, tmp_path / "a", settings())


def test_a_checkpoint_of_a_store_with_fewer_caption_fields_says_how_to_go_on(
    tmp_path: Path,
) -> None:
    bare = make_store(tmp_path / "bare.zarr", fields=("bare",))
    both = make_store(tmp_path / "both.zarr")
    run(bare, tmp_path / "a", settings())
    with pytest.raises(CheckpointError, match=r"\['bare'\], but .* name them in `align\.fields`"):
        run(both, tmp_path / "a", settings())


def test_how_often_to_save_may_change_between_two_runs(store: FeatureStore, tmp_path: Path) -> None:
    run(store, tmp_path / "a", settings(), should_stop=lambda: True)
    assert run(store, tmp_path / "a", settings(checkpoint_every=1)) is not None


def test_a_loss_that_is_not_finite_stops_with_the_step_the_keys_and_the_last_checkpoint(
    store: FeatureStore, tmp_path: Path
) -> None:
    config = settings(checkpoint_every=2, eval_every=7)
    spoil(store, config, 4)
    with pytest.raises(TrainingError, match=r"loss is not finite at step 5.*'shard/0.*ep-00000004"):
        run(store, tmp_path / "a", config)
    assert Checkpoint.open(tmp_path / "a" / "last").step == 4


def test_weights_that_are_not_finite_are_never_saved(store: FeatureStore, tmp_path: Path) -> None:
    beyond = {"learning_rate": 1e39, "warmup_fraction": 0.0}  # float32 ends at 3e38
    config = settings(checkpoint_every=1, holdout=0.0, optimizer=beyond)
    with pytest.raises(TrainingError, match=r"update is not finite at step 1.*not written yet"):
        run(store, tmp_path / "a", config)
    assert not (tmp_path / "a" / "last").exists()


def test_patience_ends_a_training_whose_scores_rise_no_more(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", rows=400)
    config = settings(
        steps=300, eval_every=2, patience=3, optimizer={"learning_rate": 1e-9}
    )  # so small that no score ever changes
    best = run(store, tmp_path / "a", config)
    assert best is not None
    assert Checkpoint.open(best).step == 8  # the last of equals
    last = Checkpoint.open(tmp_path / "a" / "last")
    assert (last.step, last.metadata["finished"]) == (8, True)
    assert run(store, tmp_path / "a", config) == best


def test_patience_counts_on_after_a_resume(store: FeatureStore, tmp_path: Path) -> None:
    config = settings(steps=300, eval_every=2, patience=3, optimizer={"learning_rate": 1e-9})
    for _ in range(5):
        run(store, tmp_path / "a", config, should_stop=lambda: True)
    run(store, tmp_path / "a", config)
    assert Checkpoint.open(tmp_path / "a" / "last").step == 8


def test_the_average_of_the_weights_is_what_is_scored_and_saved(
    store: FeatureStore, tmp_path: Path
) -> None:
    seen = list[dict[str, torch.Tensor]]()
    for _ in range(3):  # the weights after each update
        run(store, tmp_path / "plain", settings(steps=3), should_stop=lambda: True)
        seen.append(load_head(tmp_path / "plain" / "last")[0].state_dict())
    run(store, tmp_path / "a", settings(ema=0.75, steps=3))
    model, _ = load_head(tmp_path / "a" / "last")
    for name, found in model.state_dict().items():
        first, second, third = (weights[name] for weights in seen)
        expected = 0.75 * (0.75 * first + 0.25 * second) + 0.25 * third
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("changes", [{"ema": 0.9}, {"micro_batch": 5}])
def test_a_resumed_run_with_an_option_ends_as_an_uninterrupted_one(
    store: FeatureStore, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = settings(head={"dim": 8, "depth": 2, "dropout": 0.2}, **changes)
    run(store, tmp_path / "a", config, should_stop=lambda: True)
    run(store, tmp_path / "a", config)
    run(store, tmp_path / "b", config)
    for name in ("model.safetensors", "state.safetensors"):
        resumed, whole = (tmp_path / run_dir / "last" / name for run_dir in ("a", "b"))
        assert resumed.read_bytes() == whole.read_bytes()


def test_bfloat16_products_leave_float32_weights(store: FeatureStore, tmp_path: Path) -> None:
    best = run(store, tmp_path / "a", settings(precision="bfloat16"))
    assert best is not None
    model, _ = load_head(best)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # which the test is without
@pytest.mark.filterwarnings("ignore:.* should not be instantiated")  # torch does it, to trace one
def test_compiled_heads_learn_as_others_do(store: FeatureStore, tmp_path: Path) -> None:
    losses = []
    for compiled in (False, True):
        run_dir = tmp_path / str(compiled)
        config = settings(compile=compiled, precision="float32")
        run(store, run_dir, config, device=torch.device("cuda"))
        losses.append([line["loss"] for line in lines(run_dir) if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_the_random_numbers_of_the_caller_are_left_alone(
    store: FeatureStore, tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    run(store, tmp_path / "a", settings(head={"dim": 8, "depth": 2, "dropout": 0.2}))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_checkpoint_of_before_there_were_starts_goes_on_from_random_weights(
    store: FeatureStore, tmp_path: Path
) -> None:
    config = settings()
    run(store, tmp_path / "a", config, should_stop=lambda: True)
    about = tmp_path / "a" / "last" / "config.json"
    described = json.loads(about.read_text())
    del described["run"]["align"]["start"], described["run"]["align"]["head"]["shortcut"]
    described["sha256"] = {}
    about.write_text(json.dumps(described))
    assert run(store, tmp_path / "a", config) is not None
    assert Checkpoint.open(tmp_path / "a" / "last").step == 8
