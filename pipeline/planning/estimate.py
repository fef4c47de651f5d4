"""The arithmetic of `sail plan`: what encoding and training cost, from sizes alone.

A product of matrices counts two FLOPs for each multiplication, as the peaks of GPUs do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from align.config import HeadConfig
from align.heads import build_head
from features.storage.chunks import CRC_BYTES

SECONDS_PER_HOUR = 3600.0
BYTES_PER_VALUE = 2


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, by its data sheet."""

    peak: float
    """FLOPs a second of dense bfloat16 products with float32 sums, without sparsity."""
    memory: int
    """Bytes."""


GPUS = {
    "A100": Gpu(312e12, 80 * 10**9),
    "H100": Gpu(989e12, 80 * 10**9),
    "H200": Gpu(989e12, 141 * 10**9),
    "L40S": Gpu(362e12, 48 * 10**9),
    "RTX 4090": Gpu(165e12, 24 * 10**9),
}
"""Source: NVIDIA's data sheets of A100 80GB, H100 SXM (1,979 with sparsity), H200 SXM and L40S (733
with sparsity), and its white paper on the Ada architecture for the RTX 4090 (165.2).
"""

ENCODER_UTILISATION = 0.4
"""Share of the peak that a frozen encoder reaches in batches. Assumed; the output says so."""
HEAD_UTILISATION = 0.2
"""The same of the head, whose matrices are small."""


def column_bytes(rows: int, dim: int, rows_per_chunk: int) -> int:
    """Return the bytes of a column on disk: whole chunks of float16 features and of status."""
    chunks = -(-rows // rows_per_chunk)
    return chunks * (rows_per_chunk * (BYTES_PER_VALUE * dim + 1) + 2 * CRC_BYTES)


def hours(work: float, per_second: float) -> float:
    """Return how long some work takes at a rate."""
    return work / per_second / SECONDS_PER_HOUR


def head_flops(feature_dim: int, head: HeadConfig) -> int:
    """Return the FLOPs of one row in a step of training of one head, forward and backward.

    A head is built without memory, and its products are counted: of frozen features, whose gradient
    is never formed, and of what grows with the rows.
    """

    def flops(rows: int) -> int:
        with torch.device("meta"):
            network = build_head(feature_dim, **dict(head))
            features = torch.empty(rows, feature_dim)
        with FlopCounterMode(display=False) as counter:
            network(features).sum().backward()
        return int(counter.get_total_flops())

    return flops(2) - flops(1)


def training_flops(image: int, text: int, *, fields: int, batch: int, dim: int) -> int:
    """Return the FLOPs of one image and its captions in a step of stage two.

    Args:
        image: `head_flops` of the image head.
        text: Those of the text head.
        fields: Captions per image.
        batch: Images in a step; each meets all texts of it.
        dim: Length of an embedding.
    """
    return image + fields * text + 6 * batch * fields * dim


@dataclass(frozen=True)
class Phase:
    """One of the things that happen side by side while a column is filled."""

    name: str
    """`read`, `decode`, `tokenise`, `copy`, `encode` or `write`."""
    hours: float
    on_processor: bool
    """Whether it keeps the cores of the machine busy."""


def column_hours(phases: Sequence[Phase]) -> float:
    """Return how long a column takes: its slowest phase, and what shares the cores as a whole."""
    shared = sum(phase.hours for phase in phases if phase.on_processor)
    return max([shared, *(phase.hours for phase in phases)], default=0.0)


def bottleneck(phases: Sequence[Phase]) -> str | None:
    """Return the name of the slowest phase."""
    return max(phases, key=lambda phase: phase.hours).name if phases else None
