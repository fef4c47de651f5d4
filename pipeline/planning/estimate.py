"""The arithmetic of `sail plan`: what encoding and training cost, from sizes alone.

A product of matrices counts two FLOPs for each multiplication, as the peaks of GPUs do.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch.utils._python_dispatch import TorchDispatchMode

from align.config import HeadConfig
from align.heads import build_head
from features.config import ImageColumnConfig, ImageEncoderConfig, TextEncoderConfig
from features.storage.chunks import CRC_BYTES

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


class _Products(TorchDispatchMode):
    """Counts the FLOPs of the products of matrices that run under it."""

    flops = 0

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), options: Any = None
    ) -> Any:
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return function(*args, **(options or {}))


def head_flops(feature_dim: int, head: HeadConfig) -> int:
    """Return the FLOPs of one row in a step of training of one head, forward and backward.

    A head is built without memory, and its products are counted: of frozen features, whose gradient
    is never formed, and of what grows with the rows.
    """

    def flops(rows: int) -> int:
        with torch.device("meta"):
            network = build_head(feature_dim, **dict(head))
            features = torch.empty(rows, feature_dim)
        with _Products() as products:
            network(features).sum().backward()
        return products.flops

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


# Facts of the released configurations; the counts of parameters that follow are checked in
# tests/unit/test_estimate.py against the published ones.
_DINOV2 = {"small": (12, 384, 6), "base": (12, 768, 12), "large": (24, 1024, 16)}
_LATENTS = 512
_LATENT_WIDTH = 8 * 4096  # eight heads of 4096

KNOWN_IMAGE: dict[str, ImageTransformer] = {
    f"facebook/dinov2-{size}": ImageTransformer(
        Transformer(layers, width, 4 * width, heads, 64, heads), patch=14, size=224
    )
    for size, (layers, width, heads) in _DINOV2.items()
}
_MINILM = Transformer(6, 384, 1536, heads=12, head_dim=32, kv_heads=12)
KNOWN_TEXT: dict[str, Transformer] = {
    "sentence-transformers/all-MiniLM-L6-v2": _MINILM,
    "bundled:minilm": _MINILM,
    "nvidia/NV-Embed-v2": Transformer(
        32,
        4096,
        14336,
        heads=32,
        head_dim=128,
        kv_heads=8,
        gated_mlp=True,
        # Queries, output, and a gated MLP of four times the width; the latents' keys and values
        # are the same for every caption.
        pooling_parameters=2 * 4096 * _LATENT_WIDTH + 3 * 4096 * 16384,
        pooling_keys=_LATENTS,
        pooling_width=_LATENT_WIDTH,
    ),
}


@dataclass(frozen=True)
class EncoderSize:
    """What is known of an encoder before it is loaded; None where it is not."""

    dims: dict[str, int | None]
    """Length of a feature vector of each column, by its name (image) or of all (text: "")."""
    image: ImageTransformer | None = None
    text: Transformer | None = None
    found_in: str = "nothing known"
    """Where the sizes come from."""


def image_size(name: str, settings: ImageEncoderConfig) -> EncoderSize:
    """Return the sizes of an image encoder, without loading it or asking the hub."""
    columns: dict[str, ImageColumnConfig] = {name: settings, **settings.also}

    def dims(width: int) -> dict[str, int | None]:
        return {
            column: (2 if "+" in each.pooling else 1) * width for column, each in columns.items()
        }

    if settings.model in KNOWN_IMAGE:
        known = KNOWN_IMAGE[settings.model]
        return EncoderSize(dims(known.trunk.width), image=known, found_in="known configuration")
    folder = local_folder(settings.model, settings.revision)
    config = _config(folder)
    trunk = _trunk(config)
    if trunk is None or folder is None or "patch_size" not in config:
        return EncoderSize(dict.fromkeys(columns))
    picture = ImageTransformer(trunk, int(config["patch_size"]), _picture(folder, config))
    return EncoderSize(dims(trunk.width), image=picture, found_in="its config.json")


def text_size(settings: TextEncoderConfig) -> EncoderSize:
    """Return the sizes of a text encoder, without loading it or asking the hub."""
    if settings.model in KNOWN_TEXT:
        known = KNOWN_TEXT[settings.model]
        return EncoderSize({"": known.width}, text=known, found_in="known configuration")
    trunk = _trunk(_config(local_folder(settings.model, settings.revision)))
    if trunk is None:
        return EncoderSize({"": None})
    return EncoderSize({"": trunk.width}, text=trunk, found_in="its config.json")


def local_folder(model: str, revision: str | None) -> Path | None:
    """Return where the files of a checkpoint are on this machine; the hub is not asked."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:  # not the form of a hub id
        return None
    return Path(found).parent if isinstance(found, str) else None


def _config(folder: Path | None) -> dict[str, Any]:
    """Return a config.json with the inner configuration of its trunk; empty if there is none."""
    if folder is None:
        return {}
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    inner = config.get("text_config") or config.get("vision_config")
    return dict(config | inner if isinstance(inner, dict) else config)


def _trunk(config: dict[str, Any]) -> Transformer | None:
    """Return the sizes that a config.json of the usual names gives, None if it lacks them."""
    try:
        width, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
        heads = int(config["num_attention_heads"])
        mlp = config.get("intermediate_size") or config["mlp_ratio"] * width
    except (KeyError, TypeError, ValueError):
        return None
    return Transformer(
        layers,
        width,
        int(mlp),
        heads=heads,
        head_dim=int(config.get("head_dim") or width // heads),
        kv_heads=int(config.get("num_key_value_heads") or heads),
        gated_mlp=config.get("hidden_act") in ("silu", "swiglu"),
    )


def _picture(folder: Path, config: dict[str, Any]) -> int:
    """Return the side of the picture that the processor makes, in pixels."""
    try:
        text = (folder / "preprocessor_config.json").read_text(encoding="utf-8")
        processor = json.loads(text)
        size = processor.get("crop_size") or processor["size"]
    except (OSError, ValueError, KeyError):
        size = config.get("image_size", 224)
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge") or 224
    return int(size)
