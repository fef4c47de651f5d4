"""What the backends of other libraries share: the library, or one line, and its pictures.

These libraries come with extras of this program and are imported when a model of theirs is named.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from features.config import TextEncoderConfig
from features.encoders.checkpoint import first_line
from features.encoders.plan import shown
from features.errors import EncoderError
from features.images import Preprocessing

TEXT_SETTINGS = ("model", "revision", "instruction", "tokens_per_batch", "precision")
"""Settings of a text encoder that do not ask a library for anything of its own."""
TO_TENSOR = ("ToTensor", "MaybeToTensor")


def library(name: str, extra: str) -> Any:
    """Return a module of a library that an extra of this program brings.

    Args:
        name: Of the module.
        extra: Of this program.

    Raises:
        EncoderError: It is not installed, or cannot be imported.
    """
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        absent = str(error.name or package).partition(".")[0]
        raise EncoderError(
            f"The model is one of {package}, and {absent} is not installed. The extra "
            f"{extra!r} was expected. Install it with `pip install -e '.[{extra}]'`."
        ) from error
    except Exception as error:
        raise EncoderError(
            f"The model is one of {package}, which is installed but cannot be imported: "
            f"{first_line(error)} Versions that fit this torch {torch.__version__} were expected. "
            f"Install torchvision for this build of torch, or use the package's own torch."
        ) from error


def check_only(config: TextEncoderConfig, what: str, *, pooling: str) -> None:
    """Refuse settings of a text encoder that another library decides by itself.

    Args:
        config: As the recipe has it.
        what: Whose model it is, for the message.
        pooling: What it does.

    Raises:
        EncoderError: Naming the setting.
    """
    own = {
        name: field.get_default()
        for name, field in TextEncoderConfig.model_fields.items()
        if name not in TEXT_SETTINGS
    }
    for name, value in own.items():
        given = getattr(config, name)
        if given != value and not (name == "pooling" and given == pooling):
            raise EncoderError(
                f"The recipe has {name} = {given!r}, but {config.model} is {what}, which decides "
                f"that by itself. {shown(value)} was expected. Leave it out."
            )


@dataclass(frozen=True)
class LibraryProcessor:
    """A transform of another library up to the pixels, and the standardising that follows it."""

    processor: str
    """The library's name for it."""
    size: tuple[int, int]
    settings: dict[str, Any]
    """What the transform was made of, for the fingerprint."""
    steps: tuple[Callable[[Any], Any], ...]
    """From a picture of Pillow to one of the size that the model takes."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    in_float: bool = False

    @classmethod
    def of(cls, processor: str, transform: Any, settings: dict[str, Any]) -> "LibraryProcessor":
        """Divide a transform of torchvision into what is done to a picture and what to a tensor.

        Raises:
            EncoderError: It does not end in `ToTensor` and `Normalize`, or its pictures have more
                than one size.
        """
        *steps, to_tensor, normalise = transform.transforms
        kinds = type(to_tensor).__name__, type(normalise).__name__
        if kinds[0] not in TO_TENSOR or kinds[1] != "Normalize":
            raise EncoderError(
                f"The transform of {processor} ends in {kinds[0]} and {kinds[1]}. A picture that "
                f"becomes a tensor and is standardised was expected. Choose another model."
            )
        sizes = {transform(Image.new("RGB", size)).shape[-2:] for size in ((60, 40), (40, 90))}
        if len(sizes) > 1:
            raise EncoderError(
                f"The transform of {processor} makes pictures of {len(sizes)} sizes. One was "
                f"expected. Choose another model."
            )
        height, width = sizes.pop()
        mean, std = (tuple(map(float, each)) for each in (normalise.mean, normalise.std))
        return cls(processor, (height, width), settings, tuple(steps), mean, std)

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of what the encoder gets."""
        return self.size

    def apply(self, image: Image.Image) -> UInt8[np.ndarray, "3 height width"]:
        """Prepare an RGB image."""
        for step in self.steps:
            image = step(image)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))

    def normaliser(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Return what rescales and standardises batches on a device."""
        return Preprocessing(
            self.processor, self.size, None, None, 0, 1 / 255, self.mean, self.std
        ).normaliser(device)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain data, for the fingerprint of a column."""
        return {"processor": self.processor, "settings": self.settings}
