"""The image processor of a checkpoint: where its settings stand, and who applies them.

Those of `features.images` are applied there, fast and equal to transformers to the bit. Others are
applied by transformers' own class for Pillow, where it has one.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers.models.auto.auto_mappings import IMAGE_PROCESSOR_MAPPING_NAMES

from features.encoders.checkpoint import read_json, read_settings
from features.encoders.weights import fenced
from features.errors import EncoderError
from features.images import DEFAULTS, SUFFIXES, Preprocessing

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
TRIAL_SIZES = ((60, 40), (40, 90))
PIL = "Pil"


def processor_file(folder: Path) -> Path:
    """Return the file that has the settings: as transformers, that of all inputs comes first."""
    whole = folder / PROCESSOR
    if whole.is_file() and "image_processor" in read_json(whole):
        return whole
    return folder / PREPROCESSOR


def read_image_processor(folder: os.PathLike[str]) -> dict[str, Any]:
    """Return the settings of a checkpoint's own image processor, with its type.

    Raises:
        EncoderError: They are missing, or no JSON.
    """
    path = processor_file(Path(folder))
    if not path.is_file():
        raise EncoderError(
            f"{folder} has neither {PREPROCESSOR} nor {PROCESSOR} with an image processor. An "
            f"image encoder says in one of them how pictures are prepared. Fetch it from where the "
            f"weights came from."
        )
    settings = read_json(path)
    settings = dict(settings["image_processor"]) if path.name == PROCESSOR else settings
    if not (settings.get("image_processor_type") or settings.get("feature_extractor_type")):
        settings["image_processor_type"] = _by_type(Path(folder))
    return settings


def _by_type(folder: Path) -> str | None:
    """Return the processor of a type of models, as transformers takes it where no file says one."""
    own = read_settings(folder)
    if own.get("image_processor_type"):
        return str(own["image_processor_type"])
    known = IMAGE_PROCESSOR_MAPPING_NAMES.get(str(own.get("model_type")), {})
    return str(known[PIL.lower()]) if PIL.lower() in known else None


def make_preprocessing(
    folder: Path | None, settings: dict[str, Any]
) -> "Preprocessing | OwnProcessor":
    """Return what prepares pictures as some settings say.

    Raises:
        EncoderError: Neither this program nor transformers without torchvision can do it.
    """
    name = str(settings.get("image_processor_type") or settings.get("feature_extractor_type"))
    name = name.replace("FeatureExtractor", "ImageProcessor")
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    if folder is None or name in DEFAULTS or not hasattr(transformers, name + PIL):
        with fenced(
            f"The image processor {name} cannot be used",
            "Settings as transformers writes them were expected. Fetch its file from where the "
            "weights came from.",
        ):
            return Preprocessing.from_config(settings)
    made = OwnProcessor(name, folder)
    _ = made.output_size
    return made


@dataclass(frozen=True)
class OwnProcessor:
    """A processor of transformers for Pillow; gives float32, rescaled and standardised already."""

    processor: str
    folder: Path
    in_float: bool = True

    @cached_property
    def _own(self) -> Any:
        with fenced(
            f"The image processor {self.processor} in {self.folder} cannot be made",
            "Settings as transformers writes them were expected. Fetch its file from where the "
            "weights came from.",
        ):
            return getattr(transformers, self.processor + PIL).from_pretrained(self.folder)

    @cached_property
    def output_size(self) -> tuple[int, int]:
        """Height and width of what the encoder gets.

        Raises:
            EncoderError: It differs from image to image, or is no single picture.
        """
        with fenced(
            f"The image processor {self.processor} does not take a picture",
            "One that makes a tensor of three channels of it was expected. Choose another encoder.",
        ):
            tried = [self.apply(Image.new("RGB", size)) for size in TRIAL_SIZES]
        shapes = {each.shape for each in tried}
        shape = tried[0].shape
        if len(shapes) > 1 or len(shape) != 3 or shape[0] != 3:
            raise EncoderError(
                f"The image processor {self.processor} makes {', '.join(map(str, sorted(shapes)))} "
                f"of pictures of two sizes. Three channels of one height and width were expected. "
                f"Choose another encoder."
            )
        return shape[1], shape[2]

    def apply(self, image: Image.Image) -> Float[np.ndarray, "3 height width"]:
        """Prepare an RGB image."""
        made = self._own(image, return_tensors="np")["pixel_values"]
        return np.asarray(made[0], dtype=np.float32)

    def normaliser(self, device: torch.device) -> Callable[[Tensor], Tensor]:  # noqa: ARG002
        """Return what is left to do on a device: nothing."""
        return lambda pixels: pixels

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain data, for the fingerprint of a column."""
        settings = json.loads(self._own.to_json_string())
        return {"processor": self.processor, "settings": settings}
