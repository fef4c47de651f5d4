"""How much work an encoder is: from its config.json where it is local, else from what is known."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from features.config import ImageColumnConfig, ImageEncoderConfig, TextEncoderConfig
from pipeline.planning.estimate import ImageTransformer, Transformer

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
