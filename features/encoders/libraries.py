"""What the backends of other libraries share: the library, or one line, and its pictures.

These libraries come with extras of this program and are imported when a model of theirs is named.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from features.config import TextEncoderConfig
from features.encoders.checkpoint import (
    EncoderFiles,
    cached_on_hub,
    fetch_from_hub,
    first_line,
)
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


@dataclass(frozen=True)
class LibraryFiles:
    """Finds models in the layout of a library: folders, hub repositories, and names of its own."""

    prefix: str
    """In the recipe, with its colon."""
    module: str
    """Of the library."""
    extra: str
    weights: str
    """The file of the weights."""
    config: str
    """The file that describes a model."""
    described_by: tuple[str, ...]
    """Patterns of the files that are fetched beside the weights."""
    repository: Callable[[str], str] = str
    """From a name of the library's own to its hub repository."""

    def find(self, model: str, revision: str | None, *, weights: bool = True) -> EncoderFiles:
        """Return the files of a model, fetched where they are not here.

        Args:
            model: The prefix and a name of the library's, a hub repository, or a folder.
            revision: Of the hub repository.
            weights: Whether they are needed, or only what describes them.

        Raises:
            EncoderError: There is no such model, or not all of its files.
        """
        name = model.removeprefix(self.prefix)
        if (folder := Path(name).expanduser()).is_dir():
            called, revision = f"{self.prefix}{folder.resolve().name}", None
        else:
            patterns = [*self.described_by, *([self.weights] if weights else [])]
            folder = fetch_from_hub(self.repository(name), revision, patterns)
            called, revision = model, folder.name
        for wanted in (self.config, *([self.weights] if weights else [])):
            if not (folder / wanted).is_file():
                raise EncoderError(
                    f"{folder} has no {wanted}. The files that {self.module} writes were expected, "
                    f"with weights in safetensors, since pickled ones can run code. Choose another "
                    f"repository or folder."
                )
        return EncoderFiles(called, revision, folder, self.weights)

    def is_here(self, model: str, revision: str | None) -> bool:
        """Return whether the library is installed and the weights are on this machine."""
        name = model.removeprefix(self.prefix)
        try:
            library(self.module, self.extra)
            if (folder := Path(name).expanduser()).is_dir():
                return (folder / self.weights).is_file()
            return cached_on_hub(self.repository(name), self.weights, revision) is not None
        except EncoderError:
            return False

    def missing(self, model: str) -> tuple[bool, str, str]:
        """Of a model that is not here: whether it can be fetched, what to say, and what to do."""
        name = model.removeprefix(self.prefix)
        try:
            library(self.module, self.extra)
            if not Path(name).expanduser().is_dir():
                return True, f"{self.repository(name)} is fetched from the hub at first", ""
            self.find(model, None)
        except EncoderError as error:
            return False, str(error), ""
        return False, f"{model} is not here", ""


def check_only(
    config: TextEncoderConfig, what: str, *, pooling: str, others: tuple[str, ...] = ()
) -> None:
    """Refuse settings of a text encoder that another library decides by itself.

    Args:
        config: As the recipe has it.
        what: Whose model it is, for the message.
        pooling: What it does.
        others: Settings that it takes.

    Raises:
        EncoderError: Naming the setting.
    """
    own = {
        name: field.get_default()
        for name, field in TextEncoderConfig.model_fields.items()
        if name not in (*TEXT_SETTINGS, *others)
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
