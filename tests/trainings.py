"""Trainings of a few steps on a small store, which several tests stop, kill or spoil."""

from pathlib import Path

import numpy as np
import torch

from align.columns import open_columns
from align.config import AlignConfig, HeadConfig
from align.trainer import OnStep, train
from align.training_rows import TrainingRows
from features.store import FeatureStore
from tests.feature_stores import IMAGE, TEXT

CPU = torch.device("cpu")
CONFIG = AlignConfig(
    batch_size=32,
    steps=6,
    holdout=0.2,
    memory_mb=1,
    eval_every=2,
    checkpoint_every=1,
    head=HeadConfig(dim=4, depth=2, dropout=0.1),
)
LONG_STEPS = 300  # more than a fast machine takes in the moments before thirty kills
LONG = CONFIG.model_copy(update={"steps": LONG_STEPS, "eval_every": 20, "checkpoint_every": 5})


def run(
    store: FeatureStore,
    run_dir: Path,
    config: AlignConfig = CONFIG,
    on_step: OnStep = lambda _step, _total, _note: None,
) -> Path | None:
    return train(
        [store],
        config,
        image=IMAGE,
        text=TEXT,
        run_dir=run_dir,
        device=torch.device("cpu"),
        seed=3,
        on_step=on_step,
    )


def weights(run_dir: Path, name: str) -> bytes:
    return (run_dir / name / "model.safetensors").read_bytes()


def spoil(store: FeatureStore, config: AlignConfig, step: int) -> None:
    """Make an image that no step sees before this one (from 0) no number, late in its batch."""
    columns = open_columns([store], config, IMAGE, TEXT)
    loader = TrainingRows.select(columns, [1.0], config).loader(config, seed=0, device=CPU)
    size = config.batch_size
    before = {key for each in range(step) for key in loader.keys(each, size)}
    late = [key for key in loader.keys(step, size)[size // 2 :] if key not in before]
    row = store.keys().tolist().index(late[0])
    column = store.column(f"image/{IMAGE}")
    chunk, offset = divmod(row, column.rows_per_chunk)
    start = chunk * column.rows_per_chunk
    features = column.read(start, start + column.rows_per_chunk)
    features[offset] = np.nan
    column.write(chunk, features, column.chunk_status(chunk))
