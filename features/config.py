"""Settings of stage one: the frozen encoders, and how they run; types that settings share."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    PositiveInt,
    model_validator,
)

from features.class_lists import CLASS_LISTS
from features.storage.place import Pattern, Place, PlaceSetting, as_place_setting, local_path

SETTINGS = ConfigDict(
    extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
)
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


LAYOUTS = ("timm:", "open_clip:", "model2vec:")
"""Backends of encoders behind whose name the path of a folder can stand."""
VECTORS = "vectors:"
"""Before a table of texts and their vectors, relative to the run file."""
OWN = "python:"
"""Before a function of the user's own: its module may lie beside the run file."""


def _each_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    twice = [value for number, value in enumerate(values) if value in values[:number]]
    if twice:
        raise ValueError(f"{twice[0]!r} stands twice; name each once")
    return values


EachOnce = AfterValidator(_each_once)
"""What is named twice would be counted twice."""


def _beside_run_file(value: Any, info: Any) -> Any:
    """Make a path absolute, where it is read from a run file: it is relative to that.

    Args:
        value: What stands there; only text is changed, and no URL.
        info: pydantic's `ValidationInfo`, a protocol that cannot be checked when the program runs.
    """
    folder: Path | None = (info.context or {}).get("folder")
    if folder is None or not isinstance(value, str) or "://" in value:
        return value
    return str(folder / local_path(value))


def name_or_place(names: Collection[str]) -> Callable[[Any, Any], str | Place]:
    """Return a validator that takes one of some names, or what `DataPlace` does."""

    def validated(value: Any, info: Any) -> str | Place:
        return value if value in names else as_place_setting(_beside_run_file(value, info))

    return validated


def _list_or_file(value: Any, info: Any) -> Any:
    return value if value in CLASS_LISTS else _beside_run_file(value, info)


def _model(value: str, info: Any) -> str:
    if value.startswith(OWN):
        module, colon, function = value.removeprefix(OWN).rpartition(":")
        file = module if module.endswith(".py") else f"{module.replace('.', '/')}.py"
        path = str(_beside_run_file(file, info))
        return f"{OWN}{path}{colon}{function}" if Path(path).is_file() else value
    if value.startswith(VECTORS):
        return f"{VECTORS}{_beside_run_file(value.removeprefix(VECTORS), info)}"
    library, colon, place = value.rpartition(":") if value.startswith(LAYOUTS) else ("", "", value)
    path = str(_beside_run_file(place, info))
    return f"{library}{colon}{path}" if Path(path).is_dir() else value


BesideRunFile = BeforeValidator(_beside_run_file)
DataPlace = Annotated[PlaceSetting, BesideRunFile]
"""A path, relative to the run file, or a URL."""
DataPattern = Annotated[Pattern, BesideRunFile]
"""A pattern of files, relative to the run file or under a URL."""
ClassNames = Annotated[
    str | Place, PlainValidator(name_or_place(CLASS_LISTS)), PlainSerializer(str)
]
"""The name of a list that ships with the program, or a file."""
Templates = Annotated[tuple[str, ...] | str, AfterValidator(_list_or_file)]
"""Prompts, the name of a list of them that ships with the program, or a file."""
ModelName = Annotated[str, AfterValidator(_model)]
"""The name of a model on the hub, or its folder, relative to the run file."""


TextPooling = Annotated[
    str,
    Field(
        pattern=r"^(auto|pooler|projection|(mean|cls|last|max|weightedmean|mean_sqrt_len)"
        r"(\+(mean|cls|last|max|weightedmean|mean_sqrt_len))*)$"
    ),
]
"""Poolings of tokens, joined by `+`."""
PatchAttention = Literal["plain", "maskclip", "qq", "kk", "vv", "sclip", "clearclip"]
"""What the last block of an image encoder attends to when patches are wanted."""


class ImageColumnConfig(BaseModel):
    """A further column from the same forward pass of an image encoder."""

    model_config = SETTINGS

    pooling: Literal["auto", "cls", "mean", "cls+mean", "mean+max", "pooler", "projection"] = "auto"
    """How tokens become one vector. `pooler` is what the model itself returns, `projection` what a
    model of two towers has in common with texts. `auto` is the class token where the type has one,
    the projection of a whole CLIP, else the pooler or the mean; `sail encoders` says which."""
    layer: int = -1
    """Which layer the tokens are of. -1 is the model's `last_hidden_state`; any other is an entry
    of its `hidden_states` as transformers gives them: 0 is what goes into the first layer, -2 what
    comes out of the last but one. DINOv2 and most others normalise only the last one, so the others
    are from before that normalisation."""

    @model_validator(mode="after")
    def _pooler_has_no_layer(self) -> "ImageColumnConfig":
        if self.pooling in ("pooler", "projection") and self.layer != -1:
            raise ValueError(
                f"pooling {self.pooling!r} is what the model makes of its last layer; layer = "
                f"{self.layer} was given. Take layer out, or use another pooling"
            )
        return self


class ImageEncoderConfig(ImageColumnConfig):
    """A frozen image encoder: of transformers, timm, open_clip, your own, or raw pixels."""

    model: ModelName
    """Which model."""
    revision: str | None = None
    """Commit or tag of the hub repository; the default branch if not given."""
    mode: Literal["exact", "fast"] = "exact"
    """How images are decoded and resized. `exact` equals the checkpoint's own processor to the bit;
    `fast` is two to three times as fast, and about 0.3 % of the values differ by one grey level."""
    upright: bool = False
    """Turn pictures as their EXIF orientation says, as phones and viewers show them. The processors
    of the checkpoints do not, nor do the usual benchmarks: set it for photographs of your own."""
    batch_size: PositiveInt = 64
    """Images per forward pass. Halved when the device runs out of memory."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute type; `auto` is float32 on CPU and bfloat16 on GPU (float16 before Ampere)."""
    compile: bool = False
    """Compile the model with torch.compile before it starts, which takes a minute and needs a C++
    compiler (on a GPU also triton)."""
    also: dict[Name, ImageColumnConfig] = {}
    """Further columns from the same forward pass, by the name that each has in the store."""


class TextColumnConfig(BaseModel):
    """A further column from the same forward pass of a text encoder."""

    model_config = SETTINGS

    pooling: TextPooling = "auto"
    """How tokens become one vector: `mean`, `cls` (the first), `last`, `max`, `weightedmean` (by
    place), `mean_sqrt_len`, several joined by `+`, `pooler` (what the model itself returns) or
    `projection` (into the space of a model of two towers). `auto` is what the model's own files
    say (1_Pooling/config.json), and for types that see a whole text the `mean`; where neither says
    it, as for a plain language model, it must be set. NV-Embed takes the `mean` after its latent
    attention."""
    layer: int = -1
    """Which layer the tokens are of, as for images."""


class TextEncoderConfig(TextColumnConfig):
    """A frozen text encoder: of transformers (also NV-Embed), open_clip, model2vec or your own."""

    model: ModelName
    """Which model."""
    revision: str | None = None
    """Commit or tag of the hub repository; the default branch if not given."""
    instruction: str | None = None
    """Put before every caption. If not given, the default prompt of the model's files; "" for none.
    NV-Embed reads it, but does not pool its tokens; others by `include_prompt` of their files."""
    prompt: str | None = None
    """Name of a prompt of the model's files (config_sentence_transformers.json), instead."""
    max_length: PositiveInt | Literal["auto"] = "auto"
    """Tokens kept of a caption, special tokens included. `auto` is what the model's files say, at
    most 4,096 where they only say how much it can read. Never more than it has positions for."""
    end_token: Literal["auto"] | bool = "auto"
    """Whether an end token follows every caption. `auto`: where the tokenizer puts one, or its
    tokenizer_config.json asks for it (`add_eos_token`)."""
    attention: Literal["auto", "causal", "bidirectional"] = "auto"
    """Whether a token sees those behind it. `auto` is what config.json says, what is known of the
    model's own code, or what its type does."""
    normalise: bool = False
    """Scale vectors to length 1, also where the model's files do it. The head does not need it."""
    dim: PositiveInt | None = None
    """Keep so many of the first values, for models that were trained so (Matryoshka)."""
    tokens_per_batch: PositiveInt | None = None
    """Token budget of a forward pass; there is no padding. Halved when the device runs out of
    memory. 16,384 on a GPU and 2,048 on a CPU if not given."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights and of computing; `auto` is float32 on CPU and bfloat16 on GPU; on
    GPU it is float16 before Ampere, and for NV-Embed, as its reference computes."""
    quantise: Literal["none", "8bit", "4bit"] = "none"
    """Hold the weights of the linear layers in 8 bits (LLM.int8) or 4 (NF4), by the library
    bitsandbytes (extra `quantised`). The vectors are others, and the store says so."""
    devices: Annotated[tuple[str, ...], EachOnce] = ()
    """GPUs of this machine over which the layers are laid, such as `["cuda:0", "cuda:1"]`, where
    one is too small; all on `run.device` if not given."""
    also: dict[Name, TextColumnConfig] = {}
    """Further columns from the same forward pass, by the name that each has in the store: what an
    encoder of its own would give with that layer and pooling; if that is `auto`, with the pooling
    that is set for this encoder."""

    def columns(self, name: str) -> dict[str, "TextEncoderConfig"]:
        """Return every column, its own and those of `also`, as an encoder of its own would be set.

        Args:
            name: Of its own column.
        """
        made = {name: self.model_copy(update={"also": {}})}
        for column, each in self.also.items():
            pooling = self.pooling if each.pooling == "auto" else each.pooling
            changes = {"pooling": pooling, "layer": each.layer}
            made[column] = made[name].model_copy(update=changes)
        return made


class ExtractConfig(BaseModel):
    """How stage one runs."""

    model_config = SETTINGS

    store: PlaceSetting | None = None
    """Folder of the feature stores, `<store>/<split>.zarr`, for all stages: a path relative to
    where the command is called, or a URL (s3://, gs://). `features` in the run folder if not
    given."""
    rows_per_chunk: PositiveInt = 4096
    """Rows of one chunk: the unit of work, of writing and of resuming."""
    workers: PositiveInt | None = None
    """Threads that decode or tokenise; one per processor that the process may use if not given."""
    max_pixels: PositiveInt = 178_956_970
    """Images with more pixels are refused as decompression bombs (Pillow's own limit)."""
    max_bad_fraction: float = Field(default=1.0, ge=0, le=1)
    """Stop with an error when more than this fraction of a column is quarantined."""
