"""A trained run as one model: photographs and sentences into one space."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Num
from torch import Tensor
from torch.nn import functional as F

from align.checkpoint import Checkpoint
from align.heads import AlignmentModel
from evaluate.embedder import check_same_encoder
from features.config import ImageEncoderConfig, TextEncoderConfig
from features.encoders import load_image_encoder, load_text_encoder
from features.encoders.image import ImageColumn, ImageEncoder
from features.encoders.packing import Tokens
from features.encoders.text import TextEncoder
from features.errors import EncoderError, EvaluationError
from features.images import ImageFault
from features.storage.files import read
from pipeline.run.config import EncodersConfig, RunConfig
from pipeline.run.cpu import usable_processors


@dataclass(frozen=True)
class Aligned:
    """Both frozen encoders with the trained head; each encoder is loaded when it is first used."""

    encoders: EncodersConfig
    """Settings of both encoders."""
    max_pixels: int
    """Larger images are refused."""
    checkpoint: Checkpoint
    model: AlignmentModel
    """The head."""
    device: torch.device
    run_config: RunConfig | None = None
    """The run file that the head was trained by; none in an exported folder."""

    @classmethod
    def of_run(
        cls, config: RunConfig, checkpoint: Checkpoint, model: AlignmentModel, device: torch.device
    ) -> "Aligned":
        """Join a head that was trained with the encoders of its run file."""
        max_pixels = config.extract.max_pixels
        return cls(config.encoders, max_pixels, checkpoint, model, device, config)

    @property
    def config(self) -> RunConfig:
        """The run file that the head was trained by.

        Raises:
            EvaluationError: This is an exported folder, which has neither run file nor stores.
        """
        if self.run_config is None:
            raise EvaluationError(
                f"{self.checkpoint.path} is an exported model, without data. The folder of a run, "
                f"such as runs/demo, was expected. Use the run that it was exported from."
            )
        return self.run_config

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return self.checkpoint.head.dim

    @property
    def image_batch(self) -> int:
        """Images that are encoded at once."""
        return self.image_encoder.batch_size

    @cached_property
    def image_encoder(self) -> ImageEncoder:
        """The frozen image encoder, as it is loaded for extraction.

        Raises:
            EvaluationError: The run file does not have it, or it is another than the head's.
        """
        name, settings = self.image_settings
        encoder = load_image_encoder(name, settings, self.device, self.max_pixels)
        found = encoder.fingerprints[f"image/{self.checkpoint.image['name']}"]
        self._check(f"encoders.image.{name}", found, self.checkpoint.image)
        return encoder

    @cached_property
    def image_column(self) -> ImageColumn:
        """The column of it that the head was trained on."""
        name = self.checkpoint.image["name"]
        return next(column for column in self.image_encoder.columns if column.name == name)

    def encode_image(
        self, images: Sequence[str | Path | bytes]
    ) -> Float32[np.ndarray, "images dim"]:
        """Embed images, decoded and prepared as in `sail extract`.

        Args:
            images: Paths, or the bytes of encoded images.

        Returns:
            Normalised vectors.

        Raises:
            EncoderError: One of the images cannot be used, or the encoder cannot be loaded.
        """
        size = self.image_batch
        blocks = [np.empty((0, self.dim), dtype=np.float32)]
        with ThreadPoolExecutor(usable_processors()) as pool:
            for start in range(0, len(images), size):
                prepared = list(pool.map(self.prepare, images[start : start + size]))
                blocks.append(self.encode_pixels(prepared))
        return np.concatenate(blocks)

    def encode_text(self, texts: Sequence[str]) -> Float32[np.ndarray, "texts dim"]:
        """Embed sentences.

        Returns:
            Normalised vectors.

        Raises:
            EncoderError: The encoder cannot be loaded.
        """
        if not len(texts):
            return np.empty((0, self.dim), dtype=np.float32)
        return self.encode_tokens(self.text_encoder.tokenise(list(texts)))

    def encode_tokens(self, tokens: Sequence[Tokens]) -> Float32[np.ndarray, "texts dim"]:
        """Embed sentences that the text encoder's `tokenise` gave; normalised."""
        features = torch.from_numpy(self.text_encoder.encode_tokens(tokens))
        return self._embedded(self.model.text_head, features)

    @staticmethod
    def similarity(
        image: Float32[np.ndarray, "images dim"], text: Float32[np.ndarray, "texts dim"]
    ) -> Float32[np.ndarray, "images texts"]:
        """Return the cosine of every image with every sentence."""
        cosines: np.ndarray = image @ text.T
        return cosines

    def prepare(self, image: str | Path | bytes) -> Num[np.ndarray, "3 height width"]:
        """Decode, resize and crop an image, as the checkpoint of the encoder asks.

        Raises:
            EncoderError: It cannot be used.
        """
        data, name = (image, "An image") if isinstance(image, bytes) else (_read(image), str(image))
        try:
            return self.image_encoder.prepare(data)
        except ImageFault as fault:
            raise EncoderError(
                f"{name} cannot be used: {fault.reason}. A whole image that Pillow can decode was "
                f"expected. Leave it out, or put a whole one in its place."
            ) from fault

    def encode_pixels(
        self, prepared: Sequence[Num[np.ndarray, "3 height width"]]
    ) -> Float32[np.ndarray, "images dim"]:
        """Embed one batch of images that `prepare` gave; normalised."""
        encoder = self.image_encoder
        pixels = encoder.room_for(len(prepared))
        for place, image in zip(pixels.numpy(), prepared, strict=True):
            place[:] = image
        (features,) = encoder.encode(pixels, [self.image_column])
        return self._embedded(self.model.image_head, features)

    @torch.inference_mode()
    def _embedded(
        self, head: torch.nn.Module, features: Tensor
    ) -> Float32[np.ndarray, "batch dim"]:
        stored = features.to(self.device, torch.float16).float()  # as they would lie in a store
        embeddings: np.ndarray = F.normalize(head(stored).float(), dim=-1).cpu().numpy()
        return embeddings

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The frozen text encoder, as it is loaded for extraction.

        Raises:
            EvaluationError: The run file does not have it, or it is another than the head's.
        """
        name = str(self.checkpoint.text["name"])
        encoder = load_text_encoder(name, self.text_settings, self.device)
        self._check(f"encoders.text.{name}", encoder.fingerprint, self.checkpoint.text)
        return encoder

    def with_image_encoder(self, **changes: Any) -> "Aligned":
        """Return the same model with fields of its loaded image encoder changed."""
        other = replace(self)
        other.__dict__["image_encoder"] = replace(self.image_encoder, **changes)  # as if loaded
        return other

    def on_device(self, device: torch.device) -> "Aligned":
        """Return the same model on another device, where it computes in the same types."""
        (image, image_settings), text = self.image_settings, str(self.checkpoint.text["name"])
        precision = {"precision": self.image_column.fingerprint["dtype"]}
        images = self.encoders.image | {image: image_settings.model_copy(update=precision)}
        precision = {"precision": self.text_encoder.fingerprint["dtype"]}
        texts = {text: self.text_settings.model_copy(update=precision)}
        encoders = self.encoders.model_copy(update={"image": images, "text": texts})
        model = deepcopy(self.model).to(device)
        return replace(self, encoders=encoders, model=model, device=device)

    @property
    def image_settings(self) -> tuple[str, ImageEncoderConfig]:
        """Name and settings of the encoder whose own column, or one of `also`, the head reads.

        Raises:
            EvaluationError: The run file does not have it.
        """
        column = self.checkpoint.image["name"]
        for name, settings in self.encoders.image.items():
            if column == name or column in settings.also:
                return name, settings
        raise _no_encoder("image", column)

    @property
    def text_settings(self) -> TextEncoderConfig:
        """Settings of the encoder that the head reads.

        Raises:
            EvaluationError: The run file does not have it.
        """
        name = str(self.checkpoint.text["name"])
        columns = self.encoders.text_columns
        if name not in columns:
            raise _no_encoder("text", name)
        return columns[name]

    def _check(self, section: str, found: dict[str, Any], trained_on: dict[str, Any]) -> None:
        """Check that an encoder is the one that the head was trained on.

        An exported copy has another name, and may be used on another device: its weights count.
        """
        expected, dim = trained_on["fingerprint"], int(trained_on["dim"])
        if self.run_config is not None:
            check_same_encoder(section, found, expected, dim=dim)
            return
        found = found | {name: expected.get(name) for name in ("model", "revision", "dtype")}
        remedy = f"Put the encoder back into {self.checkpoint.path}, or export the run again."
        check_same_encoder(section, found, expected, dim=dim, remedy=remedy)


def _read(path: str | Path) -> bytes:
    try:
        return read(Path(path))
    except OSError as error:
        raise EncoderError(
            f"{path} cannot be read: {error.strerror}. An image file was expected. Correct the "
            f"path."
        ) from error


def _no_encoder(kind: str, name: str) -> EvaluationError:
    return EvaluationError(
        f"The head was trained on the {kind} encoder {name!r}, which the run file does not have. "
        f"It is needed to embed what is new. Add [encoders.{kind}.{name}] to it."
    )
