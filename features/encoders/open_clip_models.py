"""Models of two towers of the library open_clip: both into their joint space, as it computes it.

open_clip makes model, transform and tokenizer from `open_clip_config.json` (`model_cfg`,
`preprocess_cfg`); weights are taken from safetensors alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from features.config import ImageEncoderConfig, TextEncoderConfig
from features.encoders.checkpoint import (
    OPEN_CLIP,
    EncoderFiles,
    compute_dtype,
    read_json,
    versions,
)
from features.encoders.libraries import LibraryFiles, LibraryProcessor, check_only, library
from features.encoders.packing import TokenBatch, Tokens
from features.encoders.plan import Decision, EncoderPlan, PlanBuilder
from features.encoders.text import TextEncoder, batch_budget
from features.encoders.tokenizer import tokenizer_files
from features.encoders.weights import check_finite, check_whole, fenced
from features.errors import EncoderError

PREFIX = "open_clip:"
IMAGES = (
    "`open_clip:NAME` (a hub repository, a folder, or `ViT-B-32/laion2b_s34b_b79k` as open_clip "
    "names them; extra `open_clip`)"
)
TEXTS = IMAGES
WEIGHTS = "open_clip_model.safetensors"
JOINT = Decision("projection", "what open_clip itself gives")
CHARACTERS_PER_TOKEN = 128  # of a longer text no more is read


def _repository(name: str) -> str:
    """Return the hub repository of a model."""
    architecture, slash, tag = name.partition("/")
    open_clip = library("open_clip", "open_clip")
    if architecture not in open_clip.list_models():
        return name
    known = open_clip.get_pretrained_cfg(architecture, tag) if slash else {}
    if not known.get("hf_hub"):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture))
        raise EncoderError(
            f"open_clip has no weights of the name {name!r} on the hub. {architecture}/ and one "
            f"of {tags or 'none'} was expected. Correct `model`."
        )
    return str(known["hf_hub"]).rpartition("/")[0]


FILES = LibraryFiles(
    *(PREFIX, "open_clip", "open_clip", WEIGHTS, OPEN_CLIP),
    ("*.json", "*.txt", "*.model", "README.md"),
    _repository,
)
find, is_here, missing = FILES.find, FILES.is_here, FILES.missing


def resolve(config: ImageEncoderConfig | TextEncoderConfig) -> EncoderPlan:
    """Decide how a tower is used; its weights are not read.

    Raises:
        EncoderError: It cannot be found, its files do not fit open_clip, or the recipe asks for
            what it does not give.
    """
    files = find(config.model, config.revision, weights=False)
    described = read_json(files.folder / OPEN_CLIP)
    model = described.get("model_cfg")
    vision, text = (
        model.get(f"{each}_cfg") if isinstance(model, dict) else None for each in ("vision", "text")
    )
    if not (isinstance(vision, dict) and isinstance(text, dict)):
        raise EncoderError(
            f"{files.folder / OPEN_CLIP} lacks what it should say. model_cfg with vision_cfg and "
            f"text_cfg was expected. Fetch it again from where the weights came from."
        )
    made = PlanBuilder()
    named = {OPEN_CLIP: files.folder / OPEN_CLIP}
    if isinstance(config, ImageEncoderConfig):
        _resolve_image(made, config, vision, described.get("preprocess_cfg") or {})
    else:
        _resolve_text(made, config, text)
        if text.get("hf_tokenizer_name"):
            named |= tokenizer_files(files.folder)
    kind: Literal["image", "text"] = "image" if isinstance(config, ImageEncoderConfig) else "text"
    return EncoderPlan(kind, config.model, made.decisions, named)


def _resolve_image(
    made: PlanBuilder, config: ImageEncoderConfig, vision: dict[str, Any], stated: dict[str, Any]
) -> None:
    tower = vision.get("timm_model_name") or "open_clip's vision transformer"
    made.decisions["trunk"] = Decision(tower, OPEN_CLIP)
    for name, column in {"pooling": config, **config.also}.items():
        if column.pooling not in ("auto", JOINT.value) or column.layer != -1:
            raise EncoderError(
                f"pooling = {column.pooling!r} and layer = {column.layer} of {config.model}: of a "
                f"model of open_clip its projection alone can be had. pooling = 'projection' was "
                f"expected. Use the image tower in timm or transformers for tokens."
            )
        made.decisions[name if column is config else f"pooling of {name}"] = JOINT
    made.decisions["image_size"] = Decision(vision.get("image_size", 224), OPEN_CLIP)
    usual = {"interpolation": "bicubic", "resize_mode": "shortest", "mean": None, "std": None}
    for name, value in usual.items():
        own = stated.get(name)
        made.decisions[name] = (
            Decision(value or "OpenAI's", "open_clip's default")
            if own is None
            else Decision(own, OPEN_CLIP)
        )
    made.decisions["applied_by"] = Decision("open_clip", "its own transform")


def _resolve_text(made: PlanBuilder, config: TextEncoderConfig, text: dict[str, Any]) -> None:
    check_only(config, "a model of open_clip", pooling=JOINT.value)
    trunk = text.get("hf_model_name") or "open_clip's text transformer"
    made.decisions["trunk"] = Decision(trunk, OPEN_CLIP)
    made.decisions["pooling"] = JOINT
    made.decisions["attention"] = Decision("its own", "open_clip's model")
    tokenizer = text.get("hf_tokenizer_name") or "OpenAI's"
    made.decisions["tokenizer"] = Decision(tokenizer, OPEN_CLIP)
    made.decisions["max_length"] = Decision(text.get("context_length", 77), OPEN_CLIP)
    made.decide("prompt", config.instruction, Decision("", "no file names one"))


def _load(files: EncoderFiles) -> Any:
    check_whole(files.folder / WEIGHTS)
    open_clip = library("open_clip", "open_clip")
    with (
        fenced(
            f"The encoder in {files.folder} (open_clip) cannot be loaded",
            "Weights that open_clip wrote for this open_clip_config.json were expected. Fetch both "
            "from the same revision.",
        ),
        torch.random.fork_rng(devices=[]),
    ):
        model = open_clip.create_model(f"local-dir:{files.folder}", require_pretrained=True)
        model.eval().requires_grad_(False)
    check_finite(files.folder, model)
    return model


def load_image(
    config: ImageEncoderConfig,
    poolings: frozenset[str],  # noqa: ARG001 - there is one
) -> tuple[nn.Module, LibraryProcessor, dict[str, Any]]:
    """Return the image tower, what prepares its pictures, and what identifies it.

    Raises:
        EncoderError: It cannot be found, or its weights do not fit it.
    """
    plan = resolve(config)
    files = find(config.model, config.revision)
    model = _load(files)
    transforms = library("open_clip.transform", "open_clip")
    settings = dict(model.visual.preprocess_cfg)
    transform = transforms.image_transform_v2(transforms.PreprocessCfg(**settings), is_train=False)
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    return (
        OpenClipImages(model.visual),
        LibraryProcessor.of("open_clip", transform, plain),
        _identity(files, plan),
    )


def _identity(files: EncoderFiles, plan: EncoderPlan) -> dict[str, Any]:
    packages = versions("open_clip_torch", "torchvision", "timm")
    return files.fingerprint() | {"files": plan.digests(), "versions": packages}


def load_text(name: str, config: TextEncoderConfig, device: torch.device) -> TextEncoder:
    """Load the text tower.

    Raises:
        EncoderError: It cannot be found, or its weights or its tokenizer do not fit it.
    """
    plan = resolve(config)
    files = find(config.model, config.revision)
    model = _load(files).to(device)
    with fenced(
        f"The tokenizer in {files.folder} cannot be loaded by open_clip",
        "Its files beside open_clip_config.json were expected. Fetch them again.",
    ):
        own = library("open_clip", "open_clip").get_tokenizer(f"local-dir:{files.folder}")
    dtype = compute_dtype(config.precision, device)
    tokenise = OpenClipTokenizer(own, int(plan["max_length"]), plan["prompt"])
    encoder = TextEncoder(
        name=name,
        model=OpenClipTexts(model, dtype),
        tokenise=tokenise,
        tokens_per_batch=batch_budget(config, device),
        equal_lengths=True,
        first_position=0,
        device=device,
        dim=0,
        fingerprint={},
        plan=plan,
    )
    with (
        fenced(
            f"{config.model} (open_clip) cannot encode a text",
            "A tokenizer of this model was expected. Fetch both from the same revision.",
        ),
        torch.inference_mode(),
    ):
        largest = getattr(own, "vocab_size", None) or len(own.tokenizer)
        ids = [*tokenise(["a"])[0][:-1], largest - 1]  # no token may lie beyond the model's table
        encoder.dim = int(encoder.model(TokenBatch.pack([ids], device)).shape[1])
    identity = _identity(files, plan)
    encoder.fingerprint = identity | {
        "pooling": plan["pooling"],
        "instruction": plan["prompt"],
        "max_length": plan["max_length"],
        "dtype": str(dtype).removeprefix("torch."),
        "dim": encoder.dim,
        "versions": versions("torch", "transformers", "tokenizers") | identity["versions"],
    }
    return encoder


@dataclass(frozen=True)
class OpenClipTokenizer:
    """A tokenizer of open_clip, which fills every caption up to the length of its context."""

    tokenizer: Any
    max_length: int
    instruction: str = ""

    def __call__(self, captions: Sequence[str]) -> list[Tokens]:
        """Return the token numbers of each caption."""
        most = self.max_length * CHARACTERS_PER_TOKEN
        texts = [self.instruction + each for each in captions]
        texts = [each if len(each) <= most else " ".join(each.split())[:most] for each in texts]
        ids: list[Tokens] = self.tokenizer(texts, context_length=self.max_length).tolist()
        return ids


@dataclass(frozen=True)
class OpenClipOutput:
    """What the image tower gives, by the name of transformers."""

    image_embeds: Float[Tensor, "batch dim"]


class OpenClipImages(nn.Module):
    """The image tower of a model of open_clip, with its projection."""

    config = None

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> OpenClipOutput:
        """Return the projection of each picture, not normalised."""
        output = self.visual(pixels)
        return OpenClipOutput(output if torch.is_tensor(output) else output[0])


class OpenClipTexts(nn.Module):
    """The text tower of a model of open_clip, with its projection."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        super().__init__()
        model.visual = None  # each tower is an encoder of its own
        self.model = model
        self.dtype = dtype

    def forward(self, batch: TokenBatch) -> Float[Tensor, "sequences dim"]:
        """Return the projection of each caption, not normalised."""
        ids = batch.ids.view(-1, batch.longest)
        is_half = self.dtype != torch.float32
        with torch.autocast(ids.device.type, self.dtype, enabled=is_half):
            vectors: Tensor = self.model.encode_text(ids)
        return vectors.float()
