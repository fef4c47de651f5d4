"""A trained run as one model: photographs and sentences into one space."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Num
from torch import Tensor
from torch.nn import functional as F

from align.checkpoint import Checkpoint
from align.checkpoint import load_aligned as load_head
from align.head import AlignmentModel
from features.config import ImageEncoderConfig
from features.encoders import load_image_encoder, load_text_encoder
from features.encoders.image import ImageColumn, ImageEncoder
from features.encoders.text import TextEncoder
from features.errors import ConfigError, EncoderError, EvaluationError
from features.images import ImageFault
from pipeline.config import RunConfig, load_config
from pipeline.device import prepare_device
from pipeline.embedding import check_same_encoder
from pipeline.processors import usable_processors


@dataclass(frozen=True)
class Aligned:
    """Both frozen encoders with the trained head; each encoder is loaded when it is first used."""

    config: RunConfig
    """The run file that the head was trained by."""
    checkpoint: Checkpoint
    model: AlignmentModel
    """The head."""
    device: torch.device

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
        name, settings = self._image_settings
        encoder = load_image_encoder(name, settings, self.device)
        found = encoder.fingerprints[f"image/{self.checkpoint.image['name']}"]
        check_same_encoder(f"encoders.image.{name}", found, self.checkpoint.image["fingerprint"])
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
        features = torch.from_numpy(self._text_encoder.encode(list(texts)))
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
            return self.image_encoder.prepare(data, max_pixels=self.config.extract.max_pixels)
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
    def _text_encoder(self) -> TextEncoder:
        name = str(self.checkpoint.text["name"])
        if name not in self.config.encoders.text:
            raise _no_encoder("text", name)
        encoder = load_text_encoder(name, self.config.encoders.text[name], self.device)
        expected = self.checkpoint.text["fingerprint"]
        check_same_encoder(f"encoders.text.{name}", encoder.fingerprint, expected)
        return encoder

    @property
    def _image_settings(self) -> tuple[str, ImageEncoderConfig]:
        """The encoder whose own column, or one of `also`, the head was trained on."""
        column = self.checkpoint.image["name"]
        for name, settings in self.config.encoders.image.items():
            if column == name or column in settings.also:
                return name, settings
        raise _no_encoder("image", column)


def load_aligned(run: str | Path, device: str = "auto") -> Aligned:
    """Open a run of `sail align`: its best head, and the encoders of its run file.

    Args:
        run: Folder of the run, such as `runs/demo`.
        device: `cpu`, `cuda`, `cuda:1`, `mps`, or `auto`: the first GPU if there is one.

    Raises:
        ConfigError: There is no `config.toml` of this program in the folder.
        CheckpointError: There is no trained head.
    """
    config = open_run(run, device)
    chosen = prepare_device(config.run)
    model, checkpoint = load_head(config.run.dir / "align" / config.eval.checkpoint, chosen)
    return Aligned(config, checkpoint, model, chosen)


def open_run(run: str | Path, device: str = "auto") -> RunConfig:
    """Return the settings of a run, wherever its folder is now.

    Takes what `load_aligned` does.

    Raises:
        ConfigError: There is no `config.toml` of this program in the folder.
    """
    folder = Path(run)
    if not (folder / "config.toml").is_file():
        raise ConfigError(
            f"{folder} has no config.toml. The folder of a run, such as runs/demo, was expected. "
            f"Correct the path, or train the run by `sail align`."
        )
    here = [f"run.dir={json.dumps(str(folder))}", f"run.device={device}"]
    return load_config(str(folder / "config.toml"), here)


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
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
