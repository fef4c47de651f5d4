"""What a folder of sentence-transformers says around its transformer: pooling, Dense, prompts.

The modules are read and computed here, so that captions stay packed; nothing of that library is
needed. Modules that it has and this has not are refused by name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from features.encoders.checkpoint import MODULES, read_json, read_modules, trunk_folder
from features.encoders.weights import check_finite, fenced
from features.errors import EncoderError

LIBRARY = "sentence_transformers"
SETTINGS = "config_sentence_transformers.json"
STATIC = "StaticEmbedding"
KINDS = ("Transformer", STATIC, "Pooling", "Dense", "LayerNorm", "Normalize", "Dropout")
TRANSFORMER_FILES = (
    "sentence_bert_config.json",
    *(
        f"sentence_{name}_config.json"
        for name in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
    ),
)
POOLINGS = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weightedmean",
    "lasttoken": "last",
}
"""Their names and ours, in the order in which theirs are joined."""
FLAGS = {
    f"pooling_mode_{name}": ours
    for name, ours in {
        "cls_token": "cls",
        "max_tokens": "max",
        "mean_tokens": "mean",
        "mean_sqrt_len_tokens": "mean_sqrt_len",
        "weightedmean_tokens": "weightedmean",
        "lasttoken": "last",
    }.items()
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Identity": lambda vectors: vectors,
    "Tanh": torch.tanh,
    "GELU": F.gelu,
    "ReLU": F.relu,
    "Sigmoid": torch.sigmoid,
    "SiLU": F.silu,
}


@dataclass
class SentenceModules:
    """What the files say; None where they do not."""

    is_static: bool = False
    """Whether the first is a table of vectors, which is not pooled."""
    pooling: str | None = None
    pooling_file: str = ""
    include_prompt: bool = True
    behind: list[tuple[str, str]] = field(default_factory=list)
    """Kind and folder of each module behind the pooling, in order, without a last Normalize."""
    normalises: bool = False
    """Whether the last one scales to length 1."""
    max_length: int | None = None
    lower_case: bool = False
    transformer_file: str = ""
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    files: dict[str, Path] = field(default_factory=dict)

    def read(self, folder: Path, name: str) -> dict[str, Any]:
        """Return what a file says, and note that it entered; nothing where it is not there."""
        path = folder / name
        if not path.is_file():
            return {}
        self.files[name] = path
        return read_json(path)


def read_sentence_modules(folder: Path) -> SentenceModules:
    """Read modules.json and the files that it leads to.

    Raises:
        EncoderError: It has a module, or a setting, that is not known here.
    """
    found = SentenceModules()
    library = found.read(folder, SETTINGS)
    found.prompts = {k: str(v) for k, v in (library.get("prompts") or {}).items() if v is not None}
    found.default_prompt = library.get("default_prompt_name")
    if found.default_prompt is not None and found.default_prompt not in found.prompts:
        raise EncoderError(
            f"{folder / SETTINGS} names the prompt {found.default_prompt!r}, but has "
            f"{', '.join(found.prompts) or 'none'}. One of these was expected. Correct the file, "
            f"or set `instruction`."
        )
    modules = read_modules(folder)
    if modules:
        found.files[MODULES] = folder / MODULES
    _read_transformer(found, folder)
    for number, module in enumerate(modules):
        _read_module(found, folder, number, module)
    if found.behind and found.behind[-1][0] == "Normalize":
        found.normalises = True
        while found.behind and found.behind[-1][0] == "Normalize":
            found.behind.pop()
    return found


def _read_transformer(found: SentenceModules, folder: Path) -> None:
    place = trunk_folder(folder)
    inside = place.relative_to(folder)
    for file in TRANSFORMER_FILES:
        if settings := found.read(folder, str(inside / file)):
            break
    else:
        return
    task = settings.get("transformer_task", "feature-extraction")
    text = (settings.get("modality_config") or {}).get("text", {"method": "forward"})
    if task != "feature-extraction" or text.get("method") != "forward":
        raise EncoderError(
            f"{place / file} asks for the task {task!r} and the method {text.get('method')!r}. "
            f"Plain features of tokens were expected. Choose another text encoder."
        )
    length = settings.get("max_seq_length")
    found.max_length = None if length is None else int(length)
    found.lower_case = bool(settings.get("do_lower_case"))
    found.transformer_file = str(inside / file)


def _read_module(found: SentenceModules, folder: Path, number: int, module: dict[str, Any]) -> None:
    library, _, kind = str(module.get("type")).rpartition(".")
    if library.partition(".")[0] != LIBRARY or kind not in KINDS:
        raise EncoderError(
            f"{folder / MODULES} has a module {module.get('type')!r}, which is not known here. "
            f"{', '.join(KINDS)} of {LIBRARY} were expected. Choose another text encoder, or bring "
            f"its vectors with `sail import-store`."
        )
    found.is_static |= number == 0 and kind == STATIC
    is_first = kind in ("Transformer", STATIC)
    is_pooling = number == 1 and not found.is_static
    is_in_order = is_first == (number == 0) and (kind == "Pooling") == is_pooling
    if not is_in_order:
        raise EncoderError(
            f"{folder / MODULES} has a {kind} at place {number}. A Transformer and one Pooling, or "
            f"a {STATIC}, and then what works on sentences was expected. Choose another text "
            f"encoder."
        )
    place = str(module.get("path") or "")
    if kind == "Pooling":
        found.pooling_file = f"{place}/config.json"
        _read_pooling(found, folder)
    elif kind in ("Dense", "LayerNorm", "Normalize"):
        found.behind.append((kind, place))
        if kind != "Normalize":
            found.read(folder, f"{place}/config.json")
            for path in sorted((folder / place).glob("*.safetensors")):
                found.files[f"{place}/{path.name}"] = path


def _read_pooling(found: SentenceModules, folder: Path) -> None:
    settings = found.read(folder, found.pooling_file)
    modes = settings.get("pooling_mode")
    if modes is None:
        names = [ours for flag, ours in FLAGS.items() if settings.get(flag)] or ["mean"]
    else:
        listed = [modes] if isinstance(modes, str) else list(modes)
        if unknown := [each for each in listed if each not in POOLINGS]:
            raise EncoderError(
                f"{folder / found.pooling_file} has the pooling {unknown[0]!r}. One of "
                f"{', '.join(POOLINGS)} was expected. Set `pooling` of the text encoder."
            )
        names = [POOLINGS[each] for each in listed]
    found.pooling = "+".join(names)
    found.include_prompt = bool(settings.get("include_prompt", True))


class Behind(nn.Module):
    """The modules behind the pooling: Dense with its activation, LayerNorm, Normalize."""

    def __init__(self, folder: Path, named: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(_part(folder / place, kind) for kind, place in named)

    def forward(
        self, vectors: Float32[Tensor, "sequences dim"]
    ) -> Float32[Tensor, "sequences out_dim"]:
        """Return what becomes of each vector."""
        for part in self.parts:
            vectors = part(vectors)
        return vectors


class _Dense(nn.Module):
    def __init__(self, settings: dict[str, Any], activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        shape = int(settings["in_features"]), int(settings["out_features"])
        self.linear = nn.Linear(*shape, bias=bool(settings.get("bias", True)))
        self.activation = activation
        self.use_residual = bool(settings.get("use_residual", False))
        if self.use_residual and shape[0] != shape[1]:
            self.residual = nn.Linear(*shape, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        result = self.activation(self.linear(vectors))
        if self.use_residual:
            own = getattr(self, "residual", None)
            result = result + (vectors if own is None else own(vectors))
        return result


class _LayerNorm(nn.Module):
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(int(settings["dimension"]))

    def forward(self, vectors: Tensor) -> Tensor:
        result: Tensor = self.norm(vectors)
        return result


class _Normalise(nn.Module):
    def forward(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1)


def _part(place: Path, kind: str) -> nn.Module:
    if kind == "Normalize":
        return _Normalise()
    settings = read_json(place / "config.json")
    with fenced(
        f"The module {kind} in {place} cannot be loaded",
        "Its config.json and model.safetensors as sentence-transformers writes them were expected. "
        "Fetch them again, or choose a revision that has safetensors.",
    ):
        module = (
            _LayerNorm(settings)
            if kind == "LayerNorm"
            else _Dense(settings, _activation(place, settings))
        )
        module.load_state_dict(load_file(place / "model.safetensors"))
    check_finite(place, module)
    return module.float().eval().requires_grad_(False)


def _activation(place: Path, settings: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    name = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh"))
    inputs = (settings.get("module_input_name"), settings.get("module_output_name"))
    activation = ACTIVATIONS.get(name.rpartition(".")[2]) if name.startswith("torch.") else None
    if activation is None or any(each not in (None, "sentence_embedding") for each in inputs):
        raise EncoderError(
            f"{place / 'config.json'} has the activation {name!r} between {inputs[0]} and "
            f"{inputs[1]}. One of torch's {', '.join(ACTIVATIONS)} on the sentence was expected. "
            f"Choose another text encoder."
        )
    return activation
