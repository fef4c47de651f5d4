"""Which head is best on the features of a run: ours, and what the literature would take instead.

    python -m tests.benchmarks.heads RUN_FILE SPLIT [--rows 300,1000,0] [--set SECTION.KEY=VALUE …]

The features of the run file must be there. Of each method and number of pairs (0: all) it prints
the mean of recall@1, @5 and @10 both ways on a split, mean and standard deviation over seeds where
there is chance in it, and the CPU seconds of one fit, as lines of the table of docs/heads.md; all
numbers go to `heads.json` in `run.dir/heads`.

Ours are trained and measured by the commands themselves. The others are written down here from
their papers; what they leave open is chosen on the same held-out rows that ours have:

* ridge regression of images from captions, and of captions from images
* orthogonal Procrustes between whitened features (Conneau et al. 2018, arXiv:1710.04087)
* CSA (Li et al. 2024, arXiv:2410.07610): CCA without shrinkage, 128 components
* ASIF (Norelli et al. 2023, arXiv:2210.01738): similarities to the training pairs, no training
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from align.columns import Columns, select_rows
from align.config import AlignConfig
from align.heldout import Relevance, retrieval_ranks
from evaluate.results import read_results
from features.status import Status
from pipeline.interrupt import StopRequest
from pipeline.run.align import CLOSED_FORM, align_run
from pipeline.run.config import RunConfig, load_config, vary_config
from pipeline.run.cpu import keep_freed_memory
from pipeline.run.evaluate import evaluate_run
from pipeline.run.folder import open_store, run_folder

SEEDS = (0, 1, 2)
RANDOM = ("align.start='random'", "align.optimizer.learning_rate=1e-3", "align.epochs=50")
OURS: dict[str, tuple[str, ...]] = {
    "closed form (`--closed-form`)": CLOSED_FORM,
    "nothing said": (),
    "`linear` from random weights": ("align.head.kind='linear'", *RANDOM),
    "`glu` of 8 layers from the closed form": ("align.head.kind='glu'", "align.start='cca'"),
    "`glu` of 8 layers from random weights": ("align.head.kind='glu'", *RANDOM),
    "released recipe (`star`, Lion 1e-5)": (
        *("align.head.kind='star'", "align.head.expansion=8", "align.head.dim=1024"),
        *("align.loss.normalise='pair'", "align.loss.initial_scale=20.0"),
        *("align.optimizer.kind='lion'", "align.optimizer.learning_rate=1e-5"),
        *("align.optimizer.weight_decay=1e-4", "align.optimizer.beta2=0.99"),
        *("align.optimizer.warmup_fraction=0.1", "align.epochs=100", "align.start='random'"),
    ),
}
SHRINKAGES = [10 ** (power / 2) for power in range(-6, 5)]
Maps = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""From image features and from text features into one space."""


@dataclass(frozen=True)
class Affine:
    """Takes off a mean, and multiplies by a matrix if there is one."""

    mean: Tensor
    weight: Tensor | None = None

    def __call__(self, features: Tensor) -> Tensor:
        centred = features - self.mean
        return centred if self.weight is None else centred @ self.weight


@dataclass(frozen=True)
class Relative:
    """Cosines with anchors: the greatest ones of each row, to a power; the others are 0."""

    anchors: Tensor
    kept: int
    power: int

    def __call__(self, features: Tensor) -> Tensor:
        similar = F.normalize(features, dim=-1) @ self.anchors.T
        values, places = similar.topk(self.kept, dim=1)
        return torch.zeros_like(similar).scatter_(1, places, values.clamp(min=0) ** self.power)


@dataclass(frozen=True)
class Pairs:
    """Images with their captions, as the heads read them."""

    image: Tensor
    """float64 (images, image_dim), mean 0 and variance 1 within each row."""
    text: Tensor
    """float64 (texts, text_dim), likewise."""
    owner: Tensor
    """The image of each caption."""

    def score(self, maps: Maps) -> float:
        """Return the mean of recall@1, @5 and @10 both ways."""
        image, text = maps[0](self.image).float(), maps[1](self.text).float()
        ranks = retrieval_ranks(image, text, Relevance(len(image), self.owner))
        both = (ranks.by_image, ranks.by_text)
        return statistics.fmean((r < k).double().mean().item() for r in both for k in (1, 5, 10))

    def means(self) -> Tensor:
        """Return the mean caption of each image."""
        sums = self.text.new_zeros(len(self.image), self.text.shape[1])
        sums.index_add_(0, self.owner, self.text)
        return sums / torch.bincount(self.owner, minlength=len(self.image))[:, None]


def read(config: RunConfig, split: str, chosen: Callable[[Columns], np.ndarray]) -> Pairs:
    """Read features of some rows of a split."""
    names = (config.aligned_encoder("image"), config.aligned_encoder("text"))
    columns = Columns.open(open_store(config, run_folder(config), split), config.align, *names)
    rows = chosen(columns)
    ok = [column.status()[rows] == Status.OK for column in columns.text]
    texts = [column.rows_at(rows[good]) for column, good in zip(columns.text, ok, strict=True)]
    owner = np.concatenate([np.flatnonzero(good) for good in ok])
    image = torch.from_numpy(columns.image.rows_at(rows)).double()
    text = torch.from_numpy(np.concatenate(texts)).double()
    each = [F.layer_norm(side, side.shape[1:]) for side in (image, text)]
    return Pairs(each[0], each[1], torch.from_numpy(owner))


def best(fits: Iterator[Maps], heldout: Pairs) -> Maps:
    """Return the maps that score best on held-out rows."""
    return max(fits, key=heldout.score)


def ridge(train: Pairs, heldout: Pairs, *, to_image: bool) -> Maps:
    """Fit images from their captions, or the other way round, and compare there."""
    image, text = train.image.mean(0), train.text.mean(0)
    x, t = train.image[train.owner] - image, train.text - text
    given, wanted = (t, x) if to_image else (x, t)
    values, vectors = torch.linalg.eigh(given.T @ given)
    between = vectors.T @ (given.T @ wanted)

    def fits() -> Iterator[Maps]:
        for shrinkage in SHRINKAGES:
            weight = vectors @ (
                between / (values.clamp(min=0) + shrinkage * values.mean())[:, None]
            )
            if to_image:
                yield Affine(image), Affine(text, weight)
            else:
                yield Affine(image, weight), Affine(text)

    return best(fits(), heldout)


def whitening(features: Tensor, dim: int) -> Tensor:
    """Return what makes the first components of centred features uncorrelated, of variance 1."""
    values, vectors = torch.linalg.eigh(features.T @ features / len(features))
    kept = values.flip(0)[:dim] > 1e-10 * values.max()
    made: Tensor = vectors.flip(1)[:, :dim][:, kept] / values.flip(0)[:dim][kept].sqrt()
    return made


def between_whitened(train: Pairs, dim: int, power: float) -> Maps:
    """Turn whitened components onto each other: Procrustes for a power of 0, CCA for others."""
    image, text = train.image.mean(0), train.text.mean(0)
    of_image = whitening(train.image - image, dim)
    of_text = whitening(train.text - text, dim)
    cross = ((train.image - image) @ of_image).T @ ((train.means() - text) @ of_text)
    left, correlations, right = torch.linalg.svd(cross / len(train.image), full_matrices=False)
    scale = correlations.clamp(0, 1) ** power
    first, second = of_image @ left * scale, of_text @ right.T * scale
    return Affine(image, first), Affine(text, second)


def procrustes(train: Pairs, heldout: Pairs) -> Maps:
    """Choose how many whitened components are turned."""
    most = min(train.image.shape[1], train.text.shape[1], len(train.image) - 1)
    dims = sorted({min(dim, most) for dim in (16, 32, 64, 128, 256, 512)})
    return best((between_whitened(train, dim, 0) for dim in dims), heldout)


def csa(train: Pairs, _heldout: Pairs) -> Maps:
    """CCA of 128 components without shrinkage, scaled by the roots of their correlations."""
    return (
        between_whitened(train, 128, 0.5)
        if len(train.image) > 128
        else between_whitened(train, len(train.image) // 2, 0.5)
    )


def asif(train: Pairs, heldout: Pairs) -> Maps:
    """Compare by similarities to the training pairs, of which the greatest count."""
    anchors = [F.normalize(side, dim=-1) for side in (train.image, train.means())]

    sizes = sorted({min(kept, len(train.image)) for kept in (10, 30, 100, 300, 800)})
    fits = (
        (Relative(anchors[0], kept, power), Relative(anchors[1], kept, power))
        for kept in sizes
        for power in (2, 8)
    )
    return best(fits, heldout)


OTHERS: dict[str, Callable[[Pairs, Pairs], Maps]] = {
    "ridge, captions → images": partial(ridge, to_image=True),
    "ridge, images → captions": partial(ridge, to_image=False),
    "Procrustes": procrustes,
    "CSA": csa,
    "ASIF": asif,
}


def trained(config: RunConfig, split: str, name: str, given: list[str]) -> tuple[float, float]:
    """Train and measure by the commands; return the score and the CPU seconds of the training."""
    settings = [*given, f'eval.retrieval=["{split}"]', "eval.bootstrap=0"]
    varied = vary_config(config, config.run.dir / "heads" / name, settings)
    started = time.process_time()
    if align_run(varied, StopRequest()) is None:
        raise KeyboardInterrupt
    seconds = time.process_time() - started
    values = [
        result.value
        for result in read_results(evaluate_run(varied, StopRequest()))
        if result.dataset == split and result.task.startswith("retrieval/")
    ]
    return statistics.fmean(values), seconds


def compare(config: RunConfig, split: str, counts: list[int]) -> Iterator[dict[str, Any]]:
    """Yield what each method has for each number of pairs, with a score for each seed."""
    test = read(config, split, _usable)
    for count in counts:
        limit = [f"align.rows={count}"] if count else []
        for number, (name, settings) in enumerate(OURS.items()):
            seeds = SEEDS[:1] if settings == CLOSED_FORM else SEEDS
            found = [
                trained(
                    config,
                    split,
                    f"{number}-{count}-{seed}",
                    [*settings, *limit, f"run.seed={seed}"],
                )
                for seed in seeds
            ]
            scores, seconds = zip(*found, strict=True)
            yield {"method": name, "pairs": count, "scores": scores, "cpu_s": min(seconds)}
        align = vary_config(config, config.run.dir / "heads", limit).align
        train, heldout = (
            read(config, config.align.split, partial(_selected, align=align, heldout=each))
            for each in (False, True)
        )
        for name, fit in OTHERS.items():
            started = time.process_time()
            maps = fit(train, heldout)
            cpu_s = time.process_time() - started
            yield {"method": name, "pairs": count, "scores": [test.score(maps)], "cpu_s": cpu_s}


def _usable(columns: Columns) -> np.ndarray:
    return select_rows(columns, holdout=0, holdout_rows=1).train.nonzero()[0]


def _selected(columns: Columns, align: AlignConfig, *, heldout: bool) -> np.ndarray:
    """Return the rows that a training has, or those that are held out."""
    found = select_rows(
        columns, holdout=align.holdout, holdout_rows=align.holdout_rows, rows=align.rows
    )
    return found.heldout if heldout else found.train.nonzero()[0]


def line(found: dict[str, Any]) -> str:
    """Return a line of the table."""
    scores = [100 * score for score in found["scores"]]
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    pairs = f"{found['pairs']:,}" if found["pairs"] else "all"
    mean = f"{statistics.fmean(scores):.1f}{spread}"
    return f"| {found['method']} | {pairs} | {mean} | {found['cpu_s']:.0f} |"


@click.command()
@click.argument("recipe")
@click.argument("split")
@click.option("--rows", default="0", show_default=True, help="Numbers of pairs; 0: all.")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE")
def main(recipe: str, split: str, rows: str, overrides: tuple[str, ...]) -> None:
    """Compare the heads, and print the table."""
    keep_freed_memory()
    config = load_config(recipe, list(overrides))
    every = []
    for found in compare(config, split, [int(each) for each in rows.split(",")]):
        every.append(found)
        print(line(found), flush=True)
        path = config.run.dir / "heads" / "heads.json"
        path.write_text(json.dumps(every, indent=1))


if __name__ == "__main__":
    main()
