"""Settings of stage two: the head, the loss, the optimiser, and how long they run."""

from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from features.config import SETTINGS, EachOnce
from features.storage.place import FolderSetting, PlaceSetting


class HeadConfig(BaseModel):
    """The trained network, one per modality."""

    model_config = SETTINGS

    kind: Literal["glu", "star", "mlp", "linear", "none"] = "glu"
    """`glu`: a stack of gated layers. `star`: the released one-block head. `mlp`: one
    hidden layer with GELU, as in SigLIP. `linear`: LayerNorm and one matrix (alignment probing).
    `none`: features as they are, for two towers of one model such as CLIP (set `dim` to their
    length, and `align.steps` to 1)."""
    dim: PositiveInt = 768
    """Length of an embedding in the shared space."""
    depth: PositiveInt = 8
    """Gated layers of `glu`."""
    width: PositiveInt | None = None
    """Hidden width of `glu`; `dim` if not given."""
    expansion: PositiveInt | None = None
    """Hidden width of `star` and `mlp`, as a multiple of the feature length; 8 and 4 if not
    given."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout after each gated layer of `glu`."""
    shortcut: bool = False
    """A linear map beside the layers of `glu` and `mlp`, to which theirs is added through gates
    that are 0 at the start; always there with `align.start = "cca"`."""


class LossConfig(BaseModel):
    """The contrastive loss."""

    model_config = SETTINGS

    kind: Literal["sigmoid", "infonce"] = "sigmoid"
    """Sigmoid over pairs (SigLIP), or softmax over rows and columns (CLIP)."""
    positives: Literal["own", "identical"] = "own"
    """`own`: an image's captions. `identical`: also equal captions of other images in the batch."""
    normalise: Literal["image", "pair"] = "image"
    """Divide the sum by the number of images, or by the number of pairs (the released code)."""
    initial_scale: float = Field(default=10.0, gt=0, le=100)
    """Inverse temperature t at the start; it is learned, and kept at 100 at most."""
    initial_bias: float = -10.0
    """Offset b at the start; it is learned."""
    field_weights: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Weight of a caption field in the loss; 1 where not given."""
    block_rows: PositiveInt | None = None
    """Images per block of logits, which has four times as many texts; 1024 on a CPU and 4096 on a
    GPU if not given. The loss never holds more logits than a few such blocks."""


class OptimizerConfig(BaseModel):
    """The update rule and its schedule (linear warm-up, then cosine to zero)."""

    model_config = SETTINGS

    kind: Literal["adamw", "lion"] = "adamw"
    """Which rule."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay; on matrices only unless `decay_all`."""
    decay_all: bool = False
    """Decay LayerNorms, biases, scale and bias too, as the released code does."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.98, ge=0, lt=1)
    """Decay of the second moment (AdamW) or of the momentum (Lion, 0.99 in its paper)."""
    epsilon: PositiveFloat = 1e-8
    """AdamW's floor of the denominator. With `loss.normalise = "pair"` gradients shrink with the
    number of texts, and so should this."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Fraction of the steps over which the learning rate rises linearly."""
    max_grad_norm: PositiveFloat | None = None
    """Clip the gradient to this norm; off if not given."""


class AlignConfig(BaseModel):
    """How stage two runs.

    What the run file leaves out of `start`, `batch_size`, `epochs`, `head` and
    `optimizer.learning_rate` follows from the number of rows: see [heads.md](heads.md).
    """

    model_config = SETTINGS

    split: str = "train"
    """Split of `[data]` to train on."""
    mix: dict[str, PositiveFloat] = {}
    """Splits of `[data]` to train on together instead, and how many rows of each batch come from
    each, in proportion: `{ cc3m = 1.0, flickr = 2.0 }`."""
    store: PlaceSetting | None = None
    """Store, or folder of a run, whose features are used instead of this run's own: one that `sail
    convert` wrote, for example."""
    text_store: PlaceSetting | None = None
    """Store, or folder of a run, whose text features and captions are used with the images of the
    other; its keys must be the same, in the same order."""
    image: str | Annotated[tuple[str, ...], EachOnce, Field(min_length=1)] | None = None
    """Name of the image encoder, or of a column of its `also`; the only encoder of the recipe if
    not given. Several, `["dinov2", "dinov2-mean"]`, are read side by side as one feature, in which
    each has mean 0 and variance 1 in every row."""
    text: str | Annotated[tuple[str, ...], EachOnce, Field(min_length=1)] | None = None
    """The same of the text encoder."""
    fields: Annotated[tuple[str, ...], EachOnce] = ()
    """Caption fields used as positives; all if empty."""
    rows: PositiveInt | None = None
    """Train on at most this many rows, those with the smallest hashes of their keys, so that a
    larger number holds all rows of a smaller one; all if not given."""
    captions_per_image: PositiveInt | None = None
    """Draw this many of the fields at random for each image and step; all of them if not given."""
    start: Literal["auto", "cca", "random"] = "auto"
    """The weights at step 0. `cca`: regularised canonical correlation analysis, in closed form: all
    of a `linear` head and the `shortcut` of `glu` and `mlp`. `auto`: that, unless
    `optimizer.learning_rate` or a kind of head without a linear map (`star`, `none`) is given, or
    there are 100,000 rows."""
    batch_size: PositiveInt = 16_384
    """Images per update; every other image's captions are negatives. Lowered to the number of rows
    where there are fewer."""
    micro_batch: PositiveInt | Literal["auto"] = "auto"
    """Images that the heads hold at once, for batches whose activations do not fit: they run twice
    over the batch in such parts, and the gradients are those of the whole. `auto`: all, and half as
    many each time that a GPU is out of memory (not where several processes train together; a number
    repeats a training exactly on every GPU)."""
    epochs: PositiveFloat = 30
    """Passes over the training rows; ignored when `steps` is given."""
    steps: NonNegativeInt | None = None
    """Optimiser updates of the whole run; 0 for the head that it starts from."""
    holdout: float = Field(default=0.05, ge=0, lt=1)
    """Fraction of rows kept from training by a hash of their key, to choose the best step."""
    holdout_rows: PositiveInt = 5000
    """At most this many held-out rows are scored."""
    eval_every: PositiveInt | None = None
    """Steps between scores on the held-out rows; once an epoch if not given."""
    patience: PositiveInt | None = None
    """Stop when the held-out rank has no new best this many times in a row; off if not given."""
    checkpoint_every: PositiveInt | None = None
    """Steps between checkpoints; one a minute (and at the end) if not given."""
    memory_mb: PositiveInt = 2048
    """Memory for the loader's windows of chunks, in MiB, on the device that trains (on all devices
    together, where there are several): larger shuffles better. Stores that fit are read once."""
    host_memory_mb: NonNegativeInt = 8192
    """Pinned memory of the host, in MiB, for stores that do not fit in `memory_mb` of a GPU: those
    that fit here are read once. 0 to read windows of them from the disk again and again."""
    cache: FolderSetting | None = None
    """Folder on local disk for chunks of stores under a URL; none are kept if not given."""
    cache_mb: PositiveInt = 10_240
    """The most that is kept in `cache`, in MiB. When it is full, the other chunks are read from the
    store every time."""
    verify: bool = True
    """Check the crc32c of every chunk of features when it is read for the first time."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix products; `auto` is bfloat16 where a GPU has it, from
    Ampere on. Weights stay float32."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay per update of an average of the weights, as 0.999; the average is scored and saved in
    place of the weights; off if not given."""
    compile: bool = False
    """Compile the heads with torch.compile on a CUDA device; no effect elsewhere."""
    head: HeadConfig = HeadConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    def names(self, kind: Literal["image", "text"]) -> tuple[str, ...]:
        """Return the columns of a kind that are named, none if that is left open."""
        given = self.image if kind == "image" else self.text
        return (given,) if isinstance(given, str) else given or ()

    @model_validator(mode="after")
    def _start_has_a_map(self) -> "AlignConfig":
        if self.start == "cca" and self.head.kind in ("star", "none"):
            raise ValueError(
                f'start = "cca" needs a linear map, which head.kind = "{self.head.kind}" has not. '
                f'Choose another kind, or start = "random"'
            )
        return self

    @model_validator(mode="after")
    def _patience_has_scores(self) -> "AlignConfig":
        if self.patience is not None and self.holdout == 0:
            raise ValueError("patience needs held-out rows to score, but holdout is 0")
        return self

    @model_validator(mode="after")
    def _weights_name_fields(self) -> "AlignConfig":
        unknown = sorted(set(self.loss.field_weights) - set(self.fields)) if self.fields else []
        if unknown:
            raise ValueError(
                f"loss.field_weights names {unknown}, not among fields={list(self.fields)}"
            )
        return self
