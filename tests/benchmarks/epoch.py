"""A whole epoch of `sail align` against the training loop of the released SAIL code, on the CPU.

The method of the released code is made anew from what it does (lezhang7/SAIL at b39de67): every row
is a Python object in memory, a DataLoader without workers collates them by pad_sequence, the two
captions go through the head one after the other, and the loss holds matrices of all logits, labels
and products. Its loading of the features is not timed; ours is, and so is our checkpoint. Each runs
in a process of its own, ours with the allocator set as `sail` sets it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from align.config import AlignConfig
from align.trainer import train
from features.store import FeatureStore
from pipeline.run.cpu import keep_freed_memory
from tests.benchmarks.figure import Figure, figure_of
from tests.benchmarks.synthetic import synthetic_store

DIM, OUT, MIB = 1024, 256, 2**20  # as the heads of the demo, on features of DINOv2-L's length
FIELDS = ("short", "long")
ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
Row = tuple[Tensor, Tensor, Tensor]


class RowsInMemory(Dataset[Row]):
    """One tensor of one row for each image and caption, as `load_vectors` leaves them."""

    def __init__(self, store: FeatureStore) -> None:
        names = ["image/synthetic", *(f"text/synthetic/{field}" for field in FIELDS)]
        self.columns: list[list[Tensor]] = []
        for name in names:
            column = store.column(name)
            rows: list[Tensor] = []
            for start in range(0, store.rows, column.rows_per_chunk):
                chunk = column.read(start, min(start + column.rows_per_chunk, store.rows))
                rows += list(torch.from_numpy(chunk).split(1))
            self.columns.append(rows)

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, row: int) -> Row:
        image, short, long = (column[row] for column in self.columns)
        return image, short, long


def collate(rows: list[Row]) -> list[Tensor]:
    return [
        pad_sequence(list(each), batch_first=True).squeeze(1) for each in zip(*rows, strict=True)
    ]


class ReleasedHeads(nn.Module):
    """LayerNorm and one matrix per modality (alignment probing), the scale and the bias."""

    def __init__(self) -> None:
        super().__init__()
        self.image_norm, self.image = nn.LayerNorm(DIM), nn.Linear(DIM, OUT)
        self.text_norm, self.text = nn.LayerNorm(DIM), nn.Linear(DIM, OUT)
        self.log_scale = nn.Parameter(torch.tensor(20.0).log())
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, image: Tensor, short: Tensor, long: Tensor) -> Tensor:
        image = F.normalize(self.image(self.image_norm(image.float())), dim=-1)
        texts = [F.normalize(self.text(self.text_norm(t.float())), dim=-1) for t in (short, long)]
        logits = [self.log_scale.exp() * image @ text.T + self.bias for text in texts]
        labels = 2 * torch.eye(len(image)) - torch.ones(len(image), len(image))
        losses = torch.cat([F.logsigmoid(labels * each) for each in logits], dim=1)
        return -losses.mean()


@torch.no_grad()
def released_lion(weights: list[nn.Parameter], momenta: list[Tensor]) -> None:
    """One update of Lion, weight by weight."""
    for weight, momentum in zip(weights, momenta, strict=True):
        if weight.grad is None:
            raise ValueError("no gradient")
        weight.mul_(1 - 1e-5 * 1e-4)
        update = momentum.clone().mul_(0.9).add(weight.grad, alpha=0.1).sign_()
        weight.add_(update, alpha=-1e-5)
        momentum.mul_(0.99).add_(weight.grad, alpha=0.01)
        weight.grad = None


def seconds_of_the_released_loop(store: FeatureStore, batch: int) -> float:
    loader = DataLoader(
        RowsInMemory(store), batch, shuffle=True, drop_last=True, collate_fn=collate
    )
    heads = ReleasedHeads()
    weights = list(heads.parameters())
    momenta = [torch.zeros_like(weight) for weight in weights]
    started = time.perf_counter()
    for image, short, long in loader:
        if any(each.isnan().any() or each.isinf().any() for each in (image, short, long)):
            raise ValueError("features are not finite")
        heads(image, short, long).backward()
        released_lion(weights, momenta)
        with torch.no_grad():
            heads.log_scale.clamp_(0, 4.6052)
    return time.perf_counter() - started


def seconds_of_ours(store: FeatureStore, batch: int) -> float:
    keep_freed_memory()
    row_bytes = (1 + len(FIELDS)) * DIM * 2
    windows = max(store.rows // 2, 8192)  # half of the store, or a chunk in two windows
    config = AlignConfig.model_validate(
        {
            "batch_size": batch,
            "epochs": 1,
            "holdout": 0.0,
            "memory_mb": (windows + batch) * row_bytes // MIB + 1,
            "head": {"kind": "linear", "dim": OUT},
            "loss": {"normalise": "pair", "initial_scale": 20.0},
            "optimizer": {"kind": "lion", "learning_rate": 1e-5, "decay_all": True},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        train(
            [store],
            config,
            image="synthetic",
            text="synthetic",
            run_dir=Path(folder),
            device=CPU,
            seed=0,
        )
        return time.perf_counter() - started


LOOPS = {"ours": seconds_of_ours, "released": seconds_of_the_released_loop}


def seconds_of_child(loop: str, store: Path, batch: int) -> float:
    command = [sys.executable, "-m", "tests.benchmarks.epoch", "--time", loop]
    command += [str(store), str(batch)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


def measure(batches: Sequence[int] = (8192, 16_384), rounds: int = 3) -> list[Figure]:
    """Return how many times faster ours is, at each batch, over an epoch of four steps."""
    figures = []
    for batch in batches:
        with tempfile.TemporaryDirectory() as folder:
            store = synthetic_store(
                Path(folder), rows=4 * batch, image_dim=DIM, text_dim=DIM, fields=FIELDS
            )
            path = Path(str(store.path))
            ratios = [
                seconds_of_child("released", path, batch) / seconds_of_child("ours", path, batch)
                for _ in range(rounds)
            ]
        figures.append(
            figure_of(
                f"epoch of the released loop / ours, linear head {DIM} to {OUT}, batch {batch}",
                ratios,
                unit="ratio of time",
                goal=3.0,
                direction="min",
                module="epoch",
            )
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--time", nargs=3, metavar=("LOOP", "STORE", "BATCH"))
    arguments = parser.parse_args()
    if arguments.time:
        loop, store, batch = arguments.time
        print(LOOPS[loop](FeatureStore.open(Path(store)), int(batch)))
        return
    for figure in measure():
        print(json.dumps(figure.as_dict()) if arguments.json else figure)


if __name__ == "__main__":
    main()
