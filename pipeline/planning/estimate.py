"""The arithmetic of `sail plan`: what encoding and training cost, from sizes alone.

A product of matrices counts two FLOPs for each multiplication, as the peaks of GPUs do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from align.config import HeadConfig

CRC_BYTES = 4
SECONDS_PER_HOUR = 3600.0
BYTES_PER_VALUE = 2

GPUS: dict[str, float] = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
"""FLOPs a second of dense bfloat16 products with float32 sums, without sparsity.

Source: NVIDIA's data sheets of A100, H100 SXM (1,979 with sparsity), H200 SXM and L40S (733 with
sparsity), and its white paper on the Ada architecture for the RTX 4090 (165.2).
"""

ENCODER_UTILISATION = 0.4
"""Share of the peak that a frozen encoder reaches in batches. Assumed; the output says so."""
HEAD_UTILISATION = 0.2
"""The same of the head, whose matrices are small."""


@dataclass(frozen=True)
class Transformer:
    """The sizes that decide the work of a transformer encoder."""

    layers: int
    width: int
    mlp_width: int
    heads: int
    head_dim: int
    kv_heads: int
    gated_mlp: bool = False
    """Three matrices in the MLP instead of two."""
    pooling_parameters: int = 0
    """Of matrices behind the layers that every token goes through."""
    pooling_keys: int = 0
    """Vectors that every token attends to there, each as long as all heads together."""
    pooling_width: int = 0
    """Length of those vectors."""

    @property
    def parameters(self) -> int:
        """Those of the matrices in the layers."""
        attention = 2 * self.width * self.head_dim * (self.heads + self.kv_heads)
        mlp = (3 if self.gated_mlp else 2) * self.width * self.mlp_width
        return self.layers * (attention + mlp)

    def flops(self, tokens: float) -> float:
        """Return the FLOPs of one sequence, forward.

        Args:
            tokens: Its length; every token attends to every other.
        """
        products = 2 * (self.parameters + self.pooling_parameters) * tokens
        attention = 4 * self.layers * self.heads * self.head_dim * tokens**2
        return products + attention + 4 * self.pooling_keys * self.pooling_width * tokens


@dataclass(frozen=True)
class ImageTransformer:
    """A vision transformer at a picture size."""

    trunk: Transformer
    patch: int
    size: int
    prefix_tokens: int = 1

    @property
    def tokens(self) -> int:
        """Patches and the tokens before them."""
        return (self.size // self.patch) ** 2 + self.prefix_tokens

    @property
    def flops(self) -> float:
        """FLOPs of one image, forward."""
        patches = (self.size // self.patch) ** 2
        return self.trunk.flops(self.tokens) + 2 * patches * 3 * self.patch**2 * self.trunk.width


def column_bytes(rows: int, dim: int, rows_per_chunk: int) -> int:
    """Return the bytes of a column on disk: whole chunks of float16 features and of status."""
    chunks = -(-rows // rows_per_chunk)
    return chunks * (rows_per_chunk * (BYTES_PER_VALUE * dim + 1) + 2 * CRC_BYTES)


def hours(work: float, per_second: float) -> float:
    """Return how long some work takes at a rate."""
    return work / per_second / SECONDS_PER_HOUR


def head_parameters(feature_dim: int, head: HeadConfig) -> tuple[int, int]:
    """Return the parameters of the matrices of one head: all of them, and those it begins with.

    The gradient of the frozen features is never formed, so those it begins with work less.
    """
    if head.kind == "linear":
        first = feature_dim * head.dim
        return first, first
    if head.kind == "glu":
        sizes = [feature_dim, *[head.width or head.dim] * (head.depth - 1), head.dim]
        layers = [(2 if size == after else 3) * size * after for size, after in pairwise(sizes)]
        return sum(layers), layers[0]
    is_star = head.kind == "star"
    hidden = (head.expansion or (8 if is_star else 4)) * feature_dim
    first = (2 if is_star else 1) * feature_dim * hidden
    return first + hidden * head.dim, first


def training_flops(
    image: tuple[int, int], text: tuple[int, int], *, fields: int, batch: int, dim: int
) -> float:
    """Return the FLOPs of one image and its captions in a step of stage two.

    Args:
        image: `head_parameters` of the image head.
        text: Those of the text head.
        fields: Captions per image.
        batch: Images in a step; each meets all texts of it.
        dim: Length of an embedding.
    """
    heads = sum(
        count * (6 * every - 2 * first) for count, (every, first) in ((1, image), (fields, text))
    )
    return heads + 6 * batch * fields * dim


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
