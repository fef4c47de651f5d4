"""What `sail encoders --check` does: encodes a few inputs, and compares with the reference client.

That is the library that a model was written for: sentence-transformers for its folders, timm and
open_clip for theirs, else transformers, one input at a time and without this program's batches.
"""

import io
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor

from features.config import ImageEncoderConfig, TextEncoderConfig
from features.encoders import (
    load_image_encoder,
    load_text_encoder,
    open_clip_models,
    pretrained,
    static_embeddings,
    timm_models,
)
from features.encoders.backends import backend_of
from features.encoders.checkpoint import EncoderFiles, read_config, read_modules
from features.encoders.libraries import library
from features.encoders.plan import EncoderPlan
from features.encoders.structure import structure_of
from features.encoders.text_plan import is_half
from features.encoders.towers import IMAGE_TOWERS, TEXT_TOWERS, tower_config
from features.encoders.weights import fenced
from features.errors import EncoderError

CPU = torch.device("cpu")
TOLERANCES = {"image": 1e-5, "text": 2e-6}
"""Of a value in float32 after scaling to length 1."""
TEXTS = (
    *("a red circle", "The Green star, left of a BLUE square.", "a", "small small small"),
    *("A dog sleeps on the sofa.", "Zwei Hunde spielen im Schnee.", "猫が寝ている", "naïve café"),
    *("a photograph of a dog", "photo of 3 dogs & 12 cats", "Hello, World!", "e-mail: a@b.org"),
    *(
        "the large star above the small circle " * 2,
        "Unknown words; punctuation?!",
        "a  b",
        " star",
    ),
    *("circle\nsquare", "UPPER CASE WORDS", "1234567890", "below " * 60),
)
SIZES = tuple((16 + 23 * number, 16 + (97 * number) % 400) for number in range(20))


class Comparison(NamedTuple):
    """How far an encoder is from its reference."""

    kind: str
    reference: str
    """The library and its version."""
    inputs: int
    largest_difference: float
    tolerance: float

    @property
    def is_equal(self) -> bool:
        """Return whether the difference is within what another order of sums makes."""
        return self.largest_difference <= self.tolerance


def compare(plan: EncoderPlan, config: ImageEncoderConfig | TextEncoderConfig) -> Comparison:
    """Encode 20 inputs on the CPU in float32, and compare with the reference client.

    Args:
        plan: How the encoder is used.
        config: Of the encoder.

    Raises:
        EncoderError: It cannot be loaded, has no reference client, or that is not installed.
    """
    config = config.model_copy(update={"precision": "float32"})
    backend = backend_of(config.model)
    files = backend.find(config.model, config.revision)
    client = _CLIENTS.get((backend, plan.kind))
    if files is None or client is None or "trunk" not in plan.decisions:  # as of NV-Embed
        raise EncoderError(
            f"There is no reference client for {config.model} as an encoder of {plan.kind}s. A "
            f"model of sentence-transformers, transformers, timm or open_clip was expected. Leave "
            f"out --check."
        )
    if isinstance(config, ImageEncoderConfig):
        images = load_image_encoder("checked", config, CPU)
        prepared = [torch.from_numpy(images.prepare(_file(each))) for each in pictures()]
        found = torch.cat([images.encode(each[None])[0] for each in prepared])
    else:
        found = torch.from_numpy(load_text_encoder("checked", config, CPU).encode(TEXTS))
    with fenced(
        f"The reference client of {config.model} fails", "Leave out --check, or mend that client."
    ):
        name, vectors = client(plan, files)
    if found.shape != vectors.shape:
        raise EncoderError(
            f"{config.model} gives {found.shape[1]} numbers for one input, but {name} gives "
            f"{vectors.shape[1]}. As many were expected. Take out the settings that change that."
        )
    found[~found.isfinite().all(dim=1)] = 0  # quarantined; a reference may give zeros
    difference = float((_unit(found) - _unit(vectors)).abs().max())
    return Comparison(plan.kind, name, len(found), difference, TOLERANCES[plan.kind])


def pictures() -> list[Image.Image]:
    """Return 20 pictures of noise, of different sizes and shapes."""
    random = np.random.default_rng(0)
    return [
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in SIZES
    ]


def _file(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.double(), dim=1)


Answer = tuple[str, Tensor]


def _version(name: str) -> str:
    return f"{name} {library(name, 'dev').__version__}"


@torch.inference_mode()
def _images_of_transformers(plan: EncoderPlan, files: EncoderFiles) -> Answer:
    whole = read_config(files.folder)
    tower, pooling = IMAGE_TOWERS.get(whole.model_type), plan["pooling"]
    kind: Any = transformers.AutoModel
    if tower is not None:
        kind = tower.projected if pooling == "projection" else tower.plain
    own = tower_config(whole, "vision") if tower else whole
    model = kind.from_pretrained(files.folder, config=own).eval()
    name = plan["processor"]
    processor = getattr(transformers, f"{name}Pil", transformers.AutoImageProcessor)
    made = processor.from_pretrained(files.folder)
    rows = []
    for picture in pictures():
        output = model(**made(picture, return_tensors="pt"))
        structure = structure_of(own)
        rows.append(_pooled(output, pooling, (structure.prefix or 0) if structure else 0))
    return _version("transformers"), torch.cat(rows)


def _pooled(output: Any, pooling: str, prefix: int) -> Tensor:
    outputs: dict[str, Callable[[], Tensor]] = {
        "pooler": lambda: output.pooler_output.flatten(1),
        "projection": lambda: output.image_embeds,
        "cls": lambda: output.last_hidden_state[:, 0],
        "mean": lambda: _tokens(output)[:, prefix:].mean(1),
    }
    if pooling not in outputs:
        raise ValueError(f"transformers has no {pooling!r} of its own to compare with")
    return outputs[pooling]()


def _tokens(output: Any) -> Tensor:
    last: Tensor = output.last_hidden_state
    return last.flatten(2).transpose(1, 2) if last.ndim == 4 else last


@torch.inference_mode()
def _images_of_timm(plan: EncoderPlan, files: EncoderFiles) -> Answer:  # noqa: ARG001
    timm = library("timm", "timm")
    model = timm.create_model(f"local-dir:{files.folder}", pretrained=True, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    rows = [model(transform(each)[None]) for each in pictures()]
    return _version("timm"), torch.cat(rows)


@torch.inference_mode()
def _images_of_open_clip(plan: EncoderPlan, files: EncoderFiles) -> Answer:  # noqa: ARG001
    open_clip = library("open_clip", "open_clip")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{files.folder}")
    rows = [model.eval().encode_image(transform(each)[None]) for each in pictures()]
    return _version("open_clip"), torch.cat(rows)


@torch.inference_mode()
def _texts_of_open_clip(plan: EncoderPlan, files: EncoderFiles) -> Answer:  # noqa: ARG001
    open_clip = library("open_clip", "open_clip")
    place = f"local-dir:{files.folder}"
    model, tokenizer = open_clip.create_model(place).eval(), open_clip.get_tokenizer(place)
    return _version("open_clip"), torch.cat([model.encode_text(tokenizer([t])) for t in TEXTS])


def _texts_of_model2vec(plan: EncoderPlan, files: EncoderFiles) -> Answer:  # noqa: ARG001
    model = library("model2vec", "model2vec").StaticModel.from_pretrained(files.folder)
    vectors = torch.from_numpy(np.asarray(model.encode(list(TEXTS)), dtype=np.float32))
    return f"model2vec {metadata.version('model2vec')}", vectors


def _texts_of_transformers(plan: EncoderPlan, files: EncoderFiles) -> Answer:
    if read_modules(files.folder):
        client = library("sentence_transformers", "dev").SentenceTransformer
        model = client(str(files.folder), device="cpu", trust_remote_code=False)
        vectors = model.encode(list(TEXTS), convert_to_tensor=True, show_progress_bar=False)
        return _version("sentence_transformers"), vectors.float()
    return _texts_one_by_one(plan, files)


@torch.inference_mode()
def _texts_one_by_one(plan: EncoderPlan, files: EncoderFiles) -> Answer:
    whole = read_config(files.folder)
    tower, pooling = TEXT_TOWERS.get(whole.model_type), plan["pooling"]
    kind: Any = transformers.AutoModel
    if tower is not None:
        kind = tower.projected if pooling == "projection" else tower.plain
    elif is_half(whole.model_type):
        kind = transformers.AutoModelForTextEncoding
    own = tower_config(whole, "text") if tower else whole
    model = kind.from_pretrained(files.folder, config=own).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(files.folder)
    options: dict[str, Any] = {"truncation": True, "max_length": plan["max_length"]}
    options |= {"padding": "max_length"} if plan["padded"] else {}
    rows = []
    for text in TEXTS:
        ids: Sequence[int] = tokenizer(plan["prompt"] + text, **options)["input_ids"]
        if plan["end_token"] is True:
            ids = [*ids[: plan["max_length"] - 1], tokenizer.eos_token_id]
        rows.append(_text_pooled(model(torch.tensor([ids])), pooling))
    return _version("transformers"), torch.cat(rows)


def _text_pooled(output: Any, pooling: str) -> Tensor:
    outputs: dict[str, Callable[[], Tensor]] = {
        "pooler": lambda: output.pooler_output,
        "projection": lambda: output.text_embeds,
        "cls": lambda: output.last_hidden_state[:, 0],
        "last": lambda: output.last_hidden_state[:, -1],
        "mean": lambda: output.last_hidden_state.mean(1),
        "max": lambda: output.last_hidden_state.amax(1),
    }
    if pooling not in outputs:
        raise ValueError(f"transformers has no {pooling!r} of its own to compare with")
    return outputs[pooling]()


_CLIENTS: dict[tuple[Any, str], Callable[[EncoderPlan, EncoderFiles], Answer]] = {
    (pretrained, "image"): _images_of_transformers,
    (pretrained, "text"): _texts_of_transformers,
    (static_embeddings, "text"): _texts_of_model2vec,
    (timm_models, "image"): _images_of_timm,
    (open_clip_models, "image"): _images_of_open_clip,
    (open_clip_models, "text"): _texts_of_open_clip,
}
"""By the backend, and what is encoded."""
