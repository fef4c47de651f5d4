"""Time of retrieval both ways over 25,000 captions and 5,000 images, against the bare product.

The least that an exact method pays is one matrix product; it is cut into the same blocks.
"""

import argparse
import json
import time

import torch
from torch.nn import functional as F

from align.heldout import COSINES_AT_ONCE, Relevance, retrieval_ranks
from tests.benchmarks.figure import Figure, figure_of

CAPTIONS_PER_IMAGE = 5


def seconds(images: int, dim: int) -> tuple[float, float]:
    """Return the seconds of retrieval, and of a bare product of the same arrays."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(images).repeat_interleave(CAPTIONS_PER_IMAGE)
    image = torch.randn(images, dim, generator=generator)
    text = image[owner] + torch.randn(len(owner), dim, generator=generator)
    relevance = Relevance(images, owner)
    started = time.perf_counter()
    retrieval_ranks(image, text, relevance)
    ours = time.perf_counter() - started
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    step = max(1, COSINES_AT_ONCE // len(text))
    started = time.perf_counter()
    for start in range(0, images, step):
        torch.mm(image[start : start + step], text.T)
    return ours, time.perf_counter() - started


def measure(images: int = 5000, dim: int = 1024, rounds: int = 3) -> list[Figure]:
    """Return the seconds, and their ratio to a bare product."""
    measured = [seconds(images, dim) for _ in range(rounds)]
    size = f"{CAPTIONS_PER_IMAGE * images} captions x {images} images, {dim}-d"
    rows = [
        (f"retrieval both ways / bare product, {size}", [a / b for a, b in measured], 2.0),
        (f"retrieval both ways, {size}", [ours for ours, _ in measured], 5.0),
    ]
    units = ("ratio", "s")
    return [
        figure_of(name, values, unit=unit, goal=goal, direction="max", module="retrieval")
        for (name, values, goal), unit in zip(rows, units, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    for figure in measure():
        print(json.dumps(figure.as_dict()) if arguments.json else figure)


if __name__ == "__main__":
    main()
