"""Image models of the library timm: its classes, its weights on the hub, its own transform.

timm makes the model and the transform from `config.json` (`architecture`, `pretrained_cfg`,
`model_args`); weights are taken from safetensors alone.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from features.config import ImageColumnConfig, ImageEncoderConfig, TextEncoderConfig
from features.encoders.checkpoint import read_json, versions
from features.encoders.libraries import LibraryFiles, LibraryProcessor, library
from features.encoders.plan import Decision, EncoderPlan, PlanBuilder
from features.encoders.pooling import LAST_LAYER
from features.encoders.text import TextEncoder
from features.encoders.weights import check_files, check_finite, fenced
from features.errors import EncoderError

PREFIX = "timm:"
IMAGES = "`timm:NAME` (a model, hub repository or folder of timm; extra `timm`)"
TEXTS = None
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def _repository(name: str) -> str:
    """Return the hub repository of a model."""
    if "/" in name:
        return name
    known = library("timm.models", "timm").get_pretrained_cfg(name)
    if known is None or not known.hf_hub_id:
        raise EncoderError(
            f"timm has no pretrained weights of the name {name!r} on the hub. A name of "
            f"timm.list_pretrained(), a hub repository or a folder was expected. Correct `model`."
        )
    return str(known.hf_hub_id)


FILES = LibraryFiles(
    PREFIX, "timm.models", "timm", WEIGHTS, CONFIG, (CONFIG, "README.md"), _repository
)
find, is_here, missing = FILES.find, FILES.is_here, FILES.missing


@dataclass(frozen=True)
class _Described:
    """What the config.json of a folder says, as timm reads it."""

    architecture: str
    arguments: dict[str, Any]
    pretrained: dict[str, Any]
    stated: frozenset[str]
    """Names of `pretrained_cfg` that the file itself has."""


def _described(folder: Path) -> _Described:
    settings = read_json(folder / CONFIG)
    if "architecture" not in settings:
        raise EncoderError(
            f"{folder / CONFIG} names no architecture of timm. The file that timm's save_for_hf "
            f"writes was expected. Leave out {PREFIX!r} for a model of transformers."
        )
    models, hub = library("timm.models", "timm"), library("timm.models._hub", "timm")
    with fenced(
        f"{folder / CONFIG} cannot be read by timm", "Fetch it again, or choose another model."
    ):
        pretrained, architecture, arguments = hub.load_model_config_from_path(folder)
        if not models.is_model(architecture):
            raise EncoderError(
                f"{folder / CONFIG} names the architecture {architecture!r}, which this timm has "
                f"not. One of timm.list_models() was expected. Update timm, or choose another."
            )
        stated = frozenset(pretrained)
        builder = library("timm.models._builder", "timm")
        resolved = builder.resolve_pretrained_cfg(architecture, pretrained_cfg=pretrained)
    return _Described(architecture, dict(arguments or {}), resolved.to_dict(), stated)


def _processor(described: _Described) -> tuple[LibraryProcessor, dict[str, Any]]:
    data = library("timm.data", "timm")
    with fenced("timm cannot make its transform", "Correct pretrained_cfg in config.json."):
        settings = data.resolve_data_config(pretrained_cfg=described.pretrained)
        transform = data.create_transform(**settings, is_training=False)
        plain = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in settings.items()
        }
        return LibraryProcessor.of("timm", transform, plain), plain


def resolve(config: ImageEncoderConfig | TextEncoderConfig) -> EncoderPlan:
    """Decide how a model is used; its weights are not read.

    Raises:
        EncoderError: It cannot be found, its files do not fit timm, or it reads captions.
    """
    if not isinstance(config, ImageEncoderConfig):
        raise _no_text(config)
    files = find(config.model, config.revision, weights=False)
    described = _described(files.folder)
    _, settings = _processor(described)
    made = PlanBuilder()
    made.decisions["trunk"] = Decision(described.architecture, CONFIG)
    columns: dict[str, ImageColumnConfig] = {"pooling": config}
    columns |= {f"pooling of {name}": each for name, each in config.also.items()}
    for name, column in columns.items():
        if column.layer != LAST_LAYER:
            if column.pooling == "auto":
                raise EncoderError(
                    f"layer = {column.layer} of {config.model} has no pooling of timm's. `cls`, "
                    f"`mean`, `cls+mean` or `mean+max` was expected. Set `pooling`."
                )
            made.decisions[name.replace("pooling", "layer")] = Decision(column.layer, "the recipe")
        made.decide(name, column.pooling, Decision("pooler", "what timm's model itself gives"))
    for name in ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std"):
        source = CONFIG if name in described.stated else "timm's default"
        made.decisions[name] = Decision(settings[name], source)
    made.decisions["applied_by"] = Decision("timm", "its own transform")
    named = {CONFIG: files.folder / CONFIG}
    return EncoderPlan("image", config.model, made.decisions, named)


def load_image(
    config: ImageEncoderConfig,
    poolings: frozenset[str],  # noqa: ARG001 - a model gives all that it has
) -> tuple[nn.Module, LibraryProcessor, dict[str, Any]]:
    """Return a model, what prepares its pictures, and what identifies it.

    Raises:
        EncoderError: It cannot be found, or its weights do not fit it.
    """
    plan = resolve(config)
    files = find(config.model, config.revision)
    check_files(files.folder, WEIGHTS)
    described = _described(files.folder)
    create = library("timm.models", "timm").create_model
    with (
        fenced(
            f"The encoder in {files.folder} (timm's {described.architecture}) cannot be loaded",
            "Weights that timm wrote for this config.json were expected. Fetch both from the same "
            "revision.",
        ),
        torch.random.fork_rng(devices=[]),
    ):
        own = create(
            described.architecture,
            pretrained=True,  # with all classes, so that timm refuses weights that do not fit
            pretrained_cfg=described.pretrained,
            pretrained_cfg_overlay={"source": "", "file": str(files.folder / WEIGHTS)},
            checkpoint_path=None,
            **described.arguments,
        )
        own.reset_classifier(0)
        model = TimmModel(own.float()).eval().requires_grad_(False)
    check_finite(files.folder, model)
    processor, _ = _processor(described)
    identity = files.fingerprint() | {
        "files": plan.digests(),
        "versions": versions("timm", "torchvision"),
    }
    return model, processor, identity


def load_text(name: str, config: TextEncoderConfig, device: torch.device) -> TextEncoder:  # noqa: ARG001
    """Refuse: timm has no models of texts."""
    raise _no_text(config)


def _no_text(config: TextEncoderConfig) -> EncoderError:
    return EncoderError(
        f"{config.model!r} is a model of timm, which sees images, but a text encoder names it. A "
        f"model of texts was expected. Choose another."
    )


@dataclass(frozen=True)
class TimmOutput:
    """What a model of timm gives, by the names of transformers."""

    last_hidden_state: Tensor
    """Tokens (batch, tokens, dim), or a map (batch, dim, height, width)."""
    pooler_output: Tensor
    hidden_states: tuple[Tensor, ...] = ()


class TimmModel(nn.Module):
    """A model of timm without its classifier."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        prefix = getattr(model, "num_prefix_tokens", None)
        patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
        self.config = SimpleNamespace(
            model_type="timm",
            classes=int(getattr(model, "cls_token", None) is not None),
            prefix=prefix,
            patch_size=None if prefix is None else patch,
            hidden_size=model.num_features,
        )

    def forward(self, pixels: Tensor, *, output_hidden_states: bool = False) -> TimmOutput:
        """Run the model once; the states are what goes into its blocks and comes out of each."""
        states: list[Tensor] = []
        blocks = getattr(self.model, "blocks", None)
        hooks = []
        if output_hidden_states and isinstance(blocks, nn.Sequential | nn.ModuleList):
            hooks = [
                blocks[0].register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])),
                *(
                    each.register_forward_hook(lambda _, __, output: states.append(output))
                    for each in blocks
                ),
            ]
        try:
            features = self.model.forward_features(pixels)
            pooled = self.model.forward_head(features, pre_logits=True)
        finally:
            for hook in hooks:
                hook.remove()
        if getattr(self.model, "output_fmt", None) == "NHWC":
            features = features.permute(0, 3, 1, 2)
        if not torch.is_tensor(features):
            features = pooled  # several maps, of which only the model itself makes one vector
        return TimmOutput(features, pooled, tuple(states))
