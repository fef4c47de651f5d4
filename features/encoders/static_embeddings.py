"""Static embeddings of the library model2vec: a vector for each token, and their mean."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from features.config import ImageEncoderConfig, TextEncoderConfig
from features.encoders.checkpoint import read_json, versions
from features.encoders.libraries import LibraryFiles, check_only, library
from features.encoders.own_functions import BytesOfText, texts_of
from features.encoders.packing import TokenBatch
from features.encoders.plan import Decision, EncoderPlan, PlanBuilder
from features.encoders.text import TextEncoder, batch_budget
from features.encoders.weights import check_files, fenced
from features.errors import EncoderError

PREFIX, CONFIG, WEIGHTS = "model2vec:", "config.json", "model.safetensors"
IMAGES = None
TEXTS = "`model2vec:NAME` (a hub repository or folder of model2vec; extra `model2vec`)"
FILES = LibraryFiles(
    *(PREFIX, "model2vec", "model2vec", WEIGHTS, CONFIG), (CONFIG, "tokenizer.json", "README.md")
)
find, is_here, missing = FILES.find, FILES.is_here, FILES.missing
DEFAULT_LENGTH = 512


def resolve(config: ImageEncoderConfig | TextEncoderConfig) -> EncoderPlan:
    """Decide how a model is used; its weights are not read.

    Raises:
        EncoderError: It cannot be found, the recipe asks for more than it does, or it is to see
            images.
    """
    if not isinstance(config, TextEncoderConfig):
        raise _no_images(config)
    check_only(config, "a model of model2vec", pooling="mean", others=("dim",))
    library("model2vec", "model2vec")
    folder = find(config.model, config.revision, weights=False).folder
    settings = read_json(folder / CONFIG)
    made = PlanBuilder()
    made.decisions["trunk"] = Decision("static embeddings", CONFIG)
    made.decisions["pooling"] = Decision("mean", "what model2vec itself gives")
    stated = Decision(settings.get("max_length"), CONFIG)
    made.decide("max_length", None, stated, Decision(DEFAULT_LENGTH, "model2vec's default"))
    made.decide("dim", config.dim, Decision("all", "no file"))
    made.decide("prompt", config.instruction, Decision("", "no file names one"))
    names = [name for name in (CONFIG, "tokenizer.json") if (folder / name).is_file()]
    files = {name: folder / name for name in names}
    return EncoderPlan("text", config.model, made.decisions, files)


def load_image(
    config: ImageEncoderConfig,
    poolings: frozenset[str],  # noqa: ARG001
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Refuse: model2vec has no models of images."""
    raise _no_images(config)


def _no_images(config: ImageEncoderConfig) -> EncoderError:
    return EncoderError(
        f"{config.model!r} is a model of model2vec, which reads captions, but an image encoder "
        f"names it. A model of images was expected. Choose another."
    )


def load_text(name: str, config: TextEncoderConfig, device: torch.device) -> TextEncoder:
    """Load a text encoder; it computes on the processor, whatever the device.

    Raises:
        EncoderError: It cannot be found or loaded, or has not so many numbers as `dim` asks for.
    """
    plan = resolve(config)
    files = find(config.model, config.revision)
    check_files(files.folder, WEIGHTS)
    with fenced(
        f"The encoder in {files.folder} (model2vec) cannot be loaded",
        "Files that model2vec wrote together were expected. Fetch them from the same revision.",
    ):
        model = library("model2vec", "model2vec").StaticModel.from_pretrained(
            files.folder, normalize=False, dimensionality=config.dim, force_download=False
        )
    if not np.isfinite(np.asarray(model.embedding, dtype=np.float32)).all():
        raise EncoderError(
            f"The weights in {files.folder} are not finite. Finite numbers were expected. Fetch "
            f"them again."
        )
    fingerprint = files.fingerprint() | {
        "pooling": plan["pooling"],
        "instruction": plan["prompt"],
        "max_length": plan["max_length"],
        "dtype": "float32",
        "dim": model.dim,
        "files": plan.digests(),
        "versions": versions("model2vec", "tokenizers"),
    }
    return TextEncoder(
        name=name,
        model=StaticTexts(model),
        tokenise=BytesOfText(plan["prompt"]),
        tokens_per_batch=batch_budget(config, device),
        equal_lengths=False,
        first_position=0,
        device=device,
        dim=model.dim,
        fingerprint=fingerprint,
        plan=plan,
    )


class StaticTexts(nn.Module):
    """A model of model2vec; captions come as bytes."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TokenBatch) -> Float[Tensor, "sequences dim"]:
        """Return the mean of each caption's tokens; NaN for one without any that it knows."""
        with fenced("model2vec cannot encode a text", "Choose another model."):
            vectors = self.model.encode(texts_of(batch), use_multiprocessing=False)
        vectors = np.asarray(vectors, dtype=np.float32)
        vectors[~vectors.any(axis=1)] = np.nan
        return torch.from_numpy(vectors).to(batch.ids.device)
