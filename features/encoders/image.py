"""Frozen image encoders: a vision model, its preprocessing, and an explicit pooling."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Num
from torch import Tensor, nn

from features.config import ExtractConfig, ImageColumnConfig, ImageEncoderConfig
from features.device.cuda import room_for
from features.device.memory import one_memory_error
from features.encoders.backends import backend_of, tell
from features.encoders.checkpoint import compute_dtype, versions
from features.encoders.libraries import LibraryProcessor
from features.encoders.own_functions import OwnProcessing
from features.encoders.plan import EncoderPlan
from features.encoders.pooling import pool_image
from features.encoders.processors import OwnProcessor
from features.encoders.structure import check_prefix
from features.encoders.weights import fenced
from features.errors import EncoderError
from features.images import Preprocessing, check_can_be_fast, decode, prepare_fast

MAX_PIXELS = ExtractConfig().max_pixels
Forward = Callable[[Tensor, Sequence[ImageColumnConfig]], list[Tensor]]
Processor = Preprocessing | OwnProcessor | LibraryProcessor | OwnProcessing


class CompiledForward:
    """A forward pass that is compiled once for each choice of columns and size of batch."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._compiled: dict[tuple[ImageColumnConfig, ...], Callable[[Tensor], list[Tensor]]] = {}

    def __call__(self, pixels: Tensor, wanted: Sequence[ImageColumnConfig]) -> list[Tensor]:
        """Return the features of each column."""
        columns = tuple(wanted)
        if columns not in self._compiled:
            self._compiled[columns] = torch.compile(
                lambda pixels: self._forward(pixels, columns), dynamic=False
            )
        return self._compiled[columns](pixels)


def check_compiles(name: str, encode: Callable[[], object]) -> None:
    """Encode once, which compiles.

    Raises:
        EncoderError: It cannot be compiled; most often there is no compiler.
    """
    try:
        encode()
    except torch.OutOfMemoryError:
        return  # not for the compiler to say: the batch is halved when images come
    except RuntimeError as error:
        raise EncoderError(
            f"The image encoder {name!r} cannot be compiled: {str(error).splitlines()[0]} A C++ "
            f"compiler (on a GPU also triton) was expected. Install one, or leave out "
            f"`compile = true`."
        ) from error


METHOD = "interpolate_pos_encoding"


def fix_position_tables(model: nn.Module, forward: Callable[[], object]) -> int:
    """Let a model reuse its interpolated position table, since its images have one size.

    Dinov2 and others hold a table for 37 × 37 patches and resize it, in each forward pass, to the
    patches of the image. A table is kept where one call made it, and where it does not change with
    the image; the output stays the same to the bit.

    Args:
        model: A vision model of transformers, which is changed.
        forward: Runs the model once on an image of the size that all will have.

    Returns:
        How many tables are kept.
    """
    modules = [module for module in model.modules() if callable(getattr(module, METHOD, None))]
    calls = [_record(module) for module in modules]
    try:
        forward()
    finally:
        for module in modules:
            delattr(module, METHOD)  # what `_record` set; the class's own method shows again
    kept = 0
    for module, made in zip(modules, calls, strict=True):
        if len(made) == 1 and _is_constant(module, *made[0]):
            setattr(module, METHOD, _Constant(made[0][1]))
            kept += 1
    return kept


def free_position_tables(model: nn.Module) -> None:
    """Undo `fix_position_tables`, so that images of other sizes get tables of their own."""
    for module in model.modules():
        if isinstance(vars(module).get(METHOD), _Constant):
            delattr(module, METHOD)


class _Constant:
    """Stands in for the method."""

    def __init__(self, table: Tensor) -> None:
        self._table = table

    def __call__(self, *_: object, **__: object) -> Tensor:
        return self._table


def _record(module: nn.Module) -> list[tuple[tuple[Any, ...], Tensor]]:
    """Note arguments and results of the method from now on."""
    original = getattr(module, METHOD)
    calls: list[tuple[tuple[Any, ...], Tensor]] = []

    def recorded(*arguments: Any) -> Tensor:
        table: Tensor = original(*arguments)
        calls.append((arguments, table))
        return table

    setattr(module, METHOD, recorded)
    return calls


def _is_constant(module: nn.Module, arguments: tuple[Any, ...], table: Tensor) -> bool:
    """Return whether other embeddings give the same table."""
    others = [torch.ones_like(each) if torch.is_tensor(each) else each for each in arguments]
    again: Tensor = getattr(module, METHOD)(*others)
    return torch.equal(table, again)


@dataclass(frozen=True)
class ImageColumn:
    """One column that an encoder fills: its features of one layer, pooled in one way."""

    name: str
    settings: ImageColumnConfig
    dim: int
    fingerprint: dict[str, Any]


@dataclass(frozen=True)
class ImageEncoder:
    """A frozen image model. Its workers call `prepare`, its device `encode`."""

    name: str
    model: nn.Module
    forward: Forward
    """From pixels on the device to one tensor of features for each pooling."""
    preprocessing: Processor
    mode: str
    upright: bool
    """Whether pictures are turned as their EXIF orientation says."""
    max_pixels: int
    """Width times height that is still decoded."""
    dtype: torch.dtype
    """What the model computes in."""
    batch_size: int
    device: torch.device
    columns: tuple[ImageColumn, ...]
    """The encoder's own column, then those of `also`."""
    plan: EncoderPlan | None = None
    """How it is used, and which of its files says so."""
    has_fixed_batch: bool = False
    """Whether a batch of another size would mean to compile anew."""

    @property
    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """What decides the features of each column, by its name in the store."""
        return {f"image/{column.name}": column.fingerprint for column in self.columns}

    def prepare(self, data: bytes) -> Num[np.ndarray, "3 height width"]:
        """Decode, resize and crop an encoded image, as the checkpoint asks.

        Raises:
            ImageFault: It cannot be used; see `features.images.decode`.
        """
        limit, upright = self.max_pixels, self.upright
        if self.mode == "fast" and isinstance(self.preprocessing, Preprocessing):
            return prepare_fast(data, self.preprocessing, max_pixels=limit, upright=upright)
        return self.preprocessing.apply(decode(data, max_pixels=limit, upright=upright))

    def room_for(self, images: int) -> Num[Tensor, "images 3 height width"]:
        """Return memory for what `prepare` gives, from which the device can copy by itself."""
        shape = (images, 3, *self.preprocessing.output_size)
        dtype = _pixel_type(self.preprocessing, self.mode)
        return room_for(self.device, shape, dtype)

    def without_room(self) -> EncoderError:
        """Return the error of a device that has not the memory for a single image."""
        return EncoderError(
            f"The image encoder {self.name!r} runs out of memory on {self.device} with a single "
            f"image. Room for one was expected. Free the device, or use another (`run.device`)."
        )

    @one_memory_error()
    @torch.inference_mode()
    def encode(
        self,
        pixels: Num[Tensor, "batch 3 height width"],
        columns: Sequence[ImageColumn] | None = None,
        *,
        batch_size: int | None = None,
    ) -> list[Float32[Tensor, "batch _"]]:
        """Return one vector per image for each column, not normalised, on the device of the model.

        Args:
            pixels: What `prepare` gave; still uint8 in most cases, so that little is copied to the
                device.
            columns: Those that are wanted; all if not given.
            batch_size: What a compiled model pads its batch to; the encoder's own if not given.
        """
        count = len(pixels)
        pixels = pixels.to(self.device, non_blocking=True)
        if self.has_fixed_batch and (missing := (batch_size or self.batch_size) - count) > 0:
            pixels = torch.cat([pixels, pixels.new_zeros(missing, *pixels.shape[1:])])
        wanted = [column.settings for column in columns or self.columns]
        return [features[:count] for features in self.forward(pixels, wanted)]


def load_image_encoder(
    name: str, config: ImageEncoderConfig, device: torch.device, max_pixels: int = MAX_PIXELS
) -> ImageEncoder:
    """Load a frozen image encoder, ready to encode.

    Args:
        name: What it is called in the store.
        config: Which model, and how it is used.
        device: Where it computes.
        max_pixels: Width times height of an image that is still decoded.

    Raises:
        EncoderError: It cannot be found, loaded or compiled, or has no such pooling or layer.
    """
    backend = backend_of(config.model)
    plan = backend.resolve(config)
    tell(f"image/{name}", plan)
    own = ImageColumnConfig(pooling=plan["pooling"], layer=config.layer)
    settings = {name: own} | {
        column: each.model_copy(update={"pooling": plan[f"pooling of {column}"]})
        for column, each in config.also.items()
    }
    poolings = frozenset(each.pooling for each in settings.values())
    model, preprocessing, identity = backend.load_image(config, poolings)
    check_fast(config.mode, preprocessing)
    dtype = compute_dtype(config.precision, device)
    model = model.to(device)

    normalise = preprocessing.normaliser(device)

    def forward(pixels: Tensor, wanted: Sequence[ImageColumnConfig]) -> list[Tensor]:
        pixels = normalise(pixels)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return [features.float() for features in pool_image(model, pixels, wanted)]

    size = preprocessing.output_size
    blank = torch.zeros(1, 3, *size, device=device, dtype=_pixel_type(preprocessing, config.mode))
    kind = getattr(model.config, "model_type", type(model).__name__)
    with (
        torch.inference_mode(),
        fenced(
            f"{config.model} (type {kind}) cannot encode an image of {size[0]} × {size[1]} pixels",
            "An image encoder whose image processor fits it was expected. Choose another, or set "
            "the size in its preprocessor_config.json.",
        ),
    ):
        fix_position_tables(model, lambda: forward(blank, [own]))
        check_prefix(model, size, device)
        dims = [features.shape[1] for features in forward(blank, list(settings.values()))]
    identity |= {
        "preprocessing": preprocessing.as_dict(),
        "mode": config.mode,
        "upright": config.upright,
        "dtype": str(dtype).removeprefix("torch."),
        "versions": versions("torch", "transformers", "pillow") | identity.get("versions", {}),
    }
    if config.mode == "fast":
        identity["versions"] |= versions("simplejpeg")
    encoder = ImageEncoder(
        name=name,
        model=model,
        forward=forward,
        preprocessing=preprocessing,
        mode=config.mode,
        upright=config.upright,
        max_pixels=max_pixels,
        dtype=dtype,
        batch_size=config.batch_size,
        device=device,
        plan=plan,
        columns=tuple(
            _column(column, each, dim, identity)
            for (column, each), dim in zip(settings.items(), dims, strict=True)
        ),
    )
    if config.compile:
        encoder = replace(encoder, forward=CompiledForward(forward), has_fixed_batch=True)
        check_compiles(name, lambda: encoder.encode(blank))
    return encoder


def _pixel_type(preprocessing: Processor, mode: str) -> torch.dtype:
    """Return the type of what `prepare` gives."""
    return torch.float32 if preprocessing.in_float and mode == "exact" else torch.uint8


def check_fast(mode: str, preprocessing: Processor) -> None:
    """Refuse a preprocessing that `mode = "fast"` cannot do, if that is the mode.

    Raises:
        EncoderError: Naming it.
    """
    if mode != "fast":
        return
    if not isinstance(preprocessing, Preprocessing):
        raise EncoderError(
            f"mode = 'fast' is not there for {preprocessing.processor}, which another library "
            f"applies. Set mode = 'exact'."
        )
    check_can_be_fast(preprocessing)


def _column(
    name: str, settings: ImageColumnConfig, dim: int, identity: dict[str, Any]
) -> ImageColumn:
    of_column = {"pooling": settings.pooling, "layer": settings.layer, "dim": dim}
    return ImageColumn(name, settings, dim, identity | of_column)
