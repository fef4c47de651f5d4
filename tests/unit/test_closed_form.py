"""The moments are numpy's, the closed form is its definition, and heads start from it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from align.checkpoint import Checkpoint, load_head
from align.columns import Columns, select_rows
from align.config import AlignConfig
from align.processes import Ring
from align.start import moments as module
from align.start.closed_form import CanonicalAnalysis, Shrinkage
from align.start.moments import Moments, PairedRows, normalised
from align.trainer import train
from features.errors import StoreCorruptError, TrainingError
from features.store import FeatureStore
from tests.commands import sail
from tests.feature_stores import IMAGE, TEXT, make_run, make_store, on_disk

CPU = torch.device("cpu")
NAMES = ("rows", "image", "text", "image_image", "text_text", "image_text")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ROWS", 48)
    monkeypatch.setattr(module, "BLOCKS_BETWEEN_SAVES", 1)


def paired(store: FeatureStore, field_weights: dict[str, float] | None = None) -> PairedRows:
    columns = Columns.open(store, AlignConfig(), IMAGE, TEXT)
    selection = select_rows(columns, holdout=0.2, holdout_rows=1000)
    return PairedRows.trained(columns, selection, field_weights or {})


def by_numpy(rows: PairedRows) -> Moments:
    """The definition, row by row and caption by caption."""

    def normal(column: Any) -> np.ndarray:
        values = column.read(0, rows.columns.store.rows).astype(np.float64)
        centred = values - values.mean(axis=1, keepdims=True)
        scaled: np.ndarray = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
        return scaled

    image, texts = normal(rows.columns.image), [normal(each) for each in rows.columns.text]
    sums = Moments.zeros(rows.columns.image.dim, rows.columns.text[0].dim)
    for row in np.flatnonzero(rows.rows):
        shares = rows.weights[row].astype(np.float64) / rows.weights[row].sum(dtype=np.float64)
        mean = sum(share * text[row] for share, text in zip(shares, texts, strict=True))
        square = sum(
            share * np.outer(text[row], text[row])
            for share, text in zip(shares, texts, strict=True)
        )
        parts = [1.0, image[row], mean, np.outer(image[row], image[row]), square,
                 np.outer(image[row], mean)]  # fmt: skip
        for name, part in zip(NAMES, parts, strict=True):
            getattr(sums, name).add_(torch.as_tensor(part))
    return sums


def assert_equal(found: Moments, expected: Moments) -> None:
    for name in NAMES:
        ours, theirs = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12 * theirs.abs().max().item())


def test_moments_are_those_of_numpy_in_float64(tmp_path: Path, small_blocks: None) -> None:
    bad = {"bad_images": (3, 70), "bad_captions": ((5, 0), (6, 1), (60, 0))}
    store = make_store(tmp_path / "s.zarr", **bad)  # type: ignore[arg-type]
    rows = paired(store, {"long": 3.0})
    found = rows.moments(None, CPU, Ring())
    assert 0 < found.rows.item() == rows.rows.sum() < 198
    assert_equal(found, by_numpy(rows))
    chosen = np.flatnonzero(rows.rows)[::3]
    rest = replace(rows, rows=rows.rows & ~np.isin(np.arange(store.rows), chosen))
    assert_equal(found - rows.of(chosen, CPU), by_numpy(rest))


def test_a_pass_that_was_interrupted_goes_on_and_appended_rows_are_added(
    tmp_path: Path, small_blocks: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    store, kept = make_store(tmp_path / "s.zarr"), tmp_path / "kept.safetensors"
    rows = paired(store)
    expected = rows.moments(None, CPU, Ring())
    damaged = on_disk(rows.columns.image.features_file(8))
    whole = damaged.read_bytes()
    damaged.write_bytes(bytes(len(whole)))
    with pytest.raises(StoreCorruptError):
        paired(FeatureStore.open(store.path)).moments(kept, CPU, Ring())
    damaged.write_bytes(whole)
    found = rows.moments(kept, CPU, Ring())
    assert f"the moments of the first 96 rows are in {kept}" in caplog.text
    for name in NAMES:
        assert torch.equal(getattr(found, name), getattr(expected, name))

    grown = replace(rows, columns=Columns.open(store, AlignConfig(), IMAGE, TEXT))
    shorter = replace(store_of(grown, 150), rows=rows.rows[:150], weights=rows.weights[:150])
    first = tmp_path / "first.safetensors"
    shorter.moments(first, CPU, Ring())
    assert_equal(rows.moments(first, CPU, Ring()), expected)
    assert f"the moments of the first 150 rows are in {first}" in caplog.text


def store_of(rows: PairedRows, count: int) -> PairedRows:
    """The same as when the store had so many rows."""
    shorter = FeatureStore.open(rows.columns.store.path)
    shorter.rows = count
    return replace(rows, columns=replace(rows.columns, store=shorter))


@pytest.mark.parametrize("change", ["a bit", "cut", "weights"])
def test_kept_moments_that_are_damaged_or_of_something_else_are_not_used(
    tmp_path: Path, change: str
) -> None:
    store, kept = make_store(tmp_path / "s.zarr"), tmp_path / "kept.safetensors"
    rows = paired(store)
    rows.moments(kept, CPU, Ring())
    content = bytearray(kept.read_bytes())
    if change == "a bit":
        content[-100] ^= 1
    elif change == "cut":
        content = content[:-8]
    else:
        rows = paired(store, {"long": 0.5})
    kept.write_bytes(content)
    assert_equal(rows.moments(kept, CPU, Ring()), by_numpy(rows))


def test_a_feature_that_is_not_a_number_is_named_by_its_row_and_key(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr")
    rows = paired(store)
    row = int(np.flatnonzero(rows.rows)[20])
    column = store.column(f"text/{TEXT}/long")
    chunk, place = divmod(row, 16)
    features = column.read(chunk * 16, chunk * 16 + 16)
    features[place] = np.inf
    column.write(chunk, features, column.chunk_status(chunk))
    with pytest.raises(TrainingError, match=rf"row {row} of .*s\.zarr, key 'shard/0*{row}', is"):
        rows.moments(None, CPU, Ring())


def test_the_closed_form_is_its_definition(tmp_path: Path) -> None:
    rows = paired(make_store(tmp_path / "s.zarr", image_dim=8, text_dim=11))
    sums = rows.moments(None, CPU, Ring())
    image, text = CanonicalAnalysis(sums).maps(Shrinkage(0.5, 0.2, 0.7), 5)

    mean_x, mean_t = (each.numpy() / sums.rows.item() for each in (sums.image, sums.text))
    of_x = sums.image_image.numpy() / sums.rows.item() - np.outer(mean_x, mean_x)
    of_t = sums.text_text.numpy() / sums.rows.item() - np.outer(mean_t, mean_t)
    cross = sums.image_text.numpy() / sums.rows.item() - np.outer(mean_x, mean_t)

    def root(matrix: np.ndarray, shrinkage: float) -> np.ndarray:
        ridge = shrinkage * np.trace(matrix) / len(matrix)
        values, vectors = np.linalg.eigh(matrix + ridge * np.eye(len(matrix)))
        whole: np.ndarray = vectors @ np.diag(values**-0.5) @ vectors.T
        return whole

    white_x, white_t = root(of_x, 0.5), root(of_t, 0.2)
    left, correlations, right = np.linalg.svd(white_x @ cross @ white_t)
    factors = correlations[:5] ** 0.7
    ours = image.weight.T @ text.weight  # the signs of the components cancel
    theirs = (white_x @ left[:, :5] * factors) @ (white_t @ right.T[:, :5] * factors).T
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-6)
    np.testing.assert_allclose(image.bias.numpy(), -image.weight.numpy() @ mean_x, atol=1e-9)
    features = torch.from_numpy(rows.columns.image.read(0, 200)[rows.rows])
    np.testing.assert_allclose(image(normalised(features)).mean(dim=0).numpy(), 0, atol=1e-5)


def settings(**changes: Any) -> AlignConfig:
    given = {"steps": 0, "holdout": 0.3, "memory_mb": 1, "start": "cca", **changes}
    return AlignConfig.model_validate(given)


def run(store: FeatureStore, path: Path, config: AlignConfig) -> Checkpoint:
    best = train([store], config, image=IMAGE, text=TEXT, run_dir=path, device=CPU, seed=0)
    assert best is not None
    return Checkpoint.open(best)


def embedded(path: Path) -> torch.Tensor:
    """Cosines between fifty images and texts of noise."""
    model, _ = load_head(path / "best")
    noise = torch.randn(50, 18, generator=torch.Generator().manual_seed(1))
    image, text = model.embed_image(noise[:, :8]), model.embed_text(noise[:, 8:])
    return F.normalize(image, dim=1) @ F.normalize(text, dim=1).T


@pytest.mark.parametrize("kind", ["glu", "mlp"])
def test_every_head_is_the_closed_form_before_its_first_step(tmp_path: Path, kind: str) -> None:
    store = make_store(tmp_path / "s.zarr", rows=400)
    linear = run(store, tmp_path / "a", settings(head={"kind": "linear"}))
    assert linear.step == 0
    assert linear.heldout["recall@10"] > 0.6  # chance is 10 of about 120
    assert run(store, tmp_path / "a", settings(head={"kind": "linear"})) == linear
    run(store, tmp_path / "b", settings(head={"kind": kind, "depth": 2}))
    torch.testing.assert_close(embedded(tmp_path / "b"), embedded(tmp_path / "a"))
    run(store, tmp_path / "c", settings(head={"kind": kind, "depth": 2, "dim": 8}, start="random"))
    assert (embedded(tmp_path / "c") - embedded(tmp_path / "a")).abs().max() > 0.1


@pytest.mark.parametrize("dim", [3, 20])
def test_fewer_dimensions_are_the_first_and_further_ones_are_zero(tmp_path: Path, dim: int) -> None:
    store = make_store(tmp_path / "s.zarr", rows=400)
    run(store, tmp_path / "a", settings(head={"kind": "linear", "dim": dim}))
    model, _ = load_head(tmp_path / "a" / "best")
    weights = model.state_dict()
    sizes = [weights[f"{side}_head.linear.weight"].norm(dim=1) for side in ("image", "text")]
    assert [int((each > 0).sum()) for each in sizes] == [min(dim, 8)] * 2


def test_the_gates_open_and_the_layers_behind_them_learn(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", rows=400)
    weights = {}
    for steps in (0, 3):
        path = tmp_path / str(steps)
        run(store, path, settings(steps=steps, eval_every=3, head={"kind": "glu", "depth": 2}))
        weights[steps] = load_head(path / "last")[0].state_dict()
    for side in ("image_head", "text_head"):
        assert not weights[0][f"{side}.shortcut.gate"].any()
        assert weights[3][f"{side}.shortcut.gate"].all()
        name = f"{side}.layers.0.gated.weight"
        assert not torch.equal(weights[3][name], weights[0][name])


def test_too_few_held_out_rows_choose_neither_the_shrinkage_nor_the_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    store = make_store(tmp_path / "s.zarr", rows=60)
    worse = {"learning_rate": 1.0, "warmup_fraction": 0.0}  # the closed form is far better
    config = settings(steps=4, eval_every=1, optimizer=worse, head={"kind": "linear"})
    assert run(store, tmp_path / "a", config).step == 4
    assert "of the training, in turn (cross-validation)" in caplog.text
    more = make_store(tmp_path / "more.zarr", rows=400)
    assert run(more, tmp_path / "b", config).step == 0


def test_closed_form_of_the_command_line(tmp_path: Path) -> None:
    run_file = make_run(tmp_path / "run", 'head = { kind = "star", dim = 4 }\nsteps = 7')
    assert sail("align", run_file, "--closed-form").stdout.strip().endswith("best")
    found = Checkpoint.open(tmp_path / "run" / "align" / "best")
    assert (found.step, found.head.kind, found.metadata["finished"]) == (0, "linear", True)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "moments" / "store-0.safetensors").is_file()


def test_with_few_rows_and_nothing_said_of_steps_the_closed_form_is_the_result(
    tmp_path: Path,
) -> None:
    store = make_store(tmp_path / "a.zarr")
    for name, config, steps in [
        ("open", AlignConfig(), 0),
        ("epochs", AlignConfig(epochs=2), 2),
        ("rate", AlignConfig.model_validate({"optimizer": {"learning_rate": 1e-3}}), 30),
    ]:
        where = tmp_path / name
        best = train(
            [store], config, weights=[1.0], image=IMAGE, text=TEXT, run_dir=where, device=CPU,
            seed=0, moments=where,
        )  # fmt: skip
        assert best is not None
        last = Checkpoint.open(where / "last")
        assert last.step == steps
        assert last.run["align"]["start"] == ("random" if name == "rate" else "cca")
