"""A trained run as one model: photographs and sentences into one space."""

import io
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, Num
from PIL import Image
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

KINDS: tuple[Literal["image"], Literal["text"]] = ("image", "text")
Picture = str | Path | bytes | Image.Image | np.ndarray
PNG_MODES = frozenset({"1", "L", "LA", "I;16", "P", "RGB", "RGBA"})


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
        for each in self.checkpoint.columns("image"):
            found = encoder.fingerprints[f"image/{each['name']}"]
            self._check(f"encoders.image.{name}", found, each)
        return encoder

    @cached_property
    def image_columns(self) -> list[ImageColumn]:
        """The columns of it that the head reads, in their order."""
        columns = {column.name: column for column in self.image_encoder.columns}
        return [columns[each["name"]] for each in self.checkpoint.columns("image")]

    @property
    def image_column(self) -> ImageColumn:
        """The one column of it that the head reads.

        Raises:
            EvaluationError: The head reads several, of which a patch has no single vector.
        """
        self.check_single("Vectors of patches need")
        return self.image_columns[0]

    def check_single(self, what: str) -> None:
        """Refuse a head that reads several columns.

        Args:
            what: What takes one, with its verb, for the message.

        Raises:
            EvaluationError: It does.
        """
        for kind in KINDS:
            if len(self.checkpoint.columns(kind)) > 1:
                name = self.checkpoint.run[kind]["name"]
                raise EvaluationError(
                    f"The head reads several {kind} columns side by side, {name}. {what} a head "
                    f"with one column of each kind. Train one, with align.{kind} set to one name."
                )

    def encode_image(self, images: Sequence[Picture]) -> Float32[np.ndarray, "images dim"]:
        """Embed images, decoded and prepared as in `sail extract`.

        Args:
            images: Paths, the bytes of encoded images, PIL images, or arrays of uint8 (height,
                width), (height, width, 3) or (height, width, 4).

        Returns:
            Normalised vectors.

        Raises:
            EncoderError: One of the images cannot be used, or the encoder cannot be loaded.
        """
        blocks = [np.empty((0, self.dim), dtype=np.float32)]
        blocks += [self.embed_images(features) for features in self._features_of(images)]
        return np.concatenate(blocks)

    def image_features(
        self, images: Sequence[Picture]
    ) -> Float32[np.ndarray, "images feature_dim"]:
        """Return the frozen features of images; takes and raises what `encode_image` does."""
        blocks = [features.float().cpu().numpy() for features in self._features_of(images)]
        empty = np.empty((0, int(self.checkpoint.image["dim"])), dtype=np.float32)
        return np.concatenate([empty, *blocks])

    def text_features(self, texts: Sequence[str]) -> Float32[np.ndarray, "texts feature_dim"]:
        """Return the frozen features of sentences; raises what `encode_text` does."""
        found: np.ndarray = self.text_encoder.encode(texts)[:, self._text_places.numpy()]
        return found

    def _features_of(self, images: Sequence[Picture]) -> Iterator[Tensor]:
        with ThreadPoolExecutor(usable_processors()) as pool:
            for start in range(0, len(images), self.image_batch):
                prepared = list(pool.map(self.prepare, images[start : start + self.image_batch]))
                yield self._pixel_features(prepared)

    def embed_images(
        self,
        features: Float[np.ndarray, "images feature_dim"] | Float[Tensor, "images feature_dim"],
    ) -> Float32[np.ndarray, "images dim"]:
        """Embed frozen features of images by the head; normalised."""
        return self._embedded(self.model.embed_image, torch.as_tensor(features))

    def embed_texts(
        self, features: Float[np.ndarray, "texts feature_dim"] | Float[Tensor, "texts feature_dim"]
    ) -> Float32[np.ndarray, "texts dim"]:
        """Embed frozen features of sentences by the head; normalised."""
        return self._embedded(self.model.embed_text, torch.as_tensor(features))

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
        return self.embed_texts(features[:, self._text_places])

    @staticmethod
    def similarity(
        image: Float32[np.ndarray, "images dim"], text: Float32[np.ndarray, "texts dim"]
    ) -> Float32[np.ndarray, "images texts"]:
        """Return the cosine of every image with every sentence."""
        cosines: np.ndarray = image @ text.T
        return cosines

    def prepare(self, image: Picture) -> Num[np.ndarray, "3 height width"]:
        """Decode, resize and crop an image, as the checkpoint of the encoder asks.

        Raises:
            EncoderError: It cannot be used.
        """
        data = _bytes(image)
        name = str(image) if isinstance(image, str | Path) else "An image"
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
        return self.embed_images(self._pixel_features(prepared))

    def _pixel_features(
        self, prepared: Sequence[Num[np.ndarray, "3 height width"]]
    ) -> Float[Tensor, "images feature_dim"]:
        encoder = self.image_encoder
        pixels = encoder.room_for(len(prepared))
        for place, image in zip(pixels.numpy(), prepared, strict=True):
            place[:] = image
        return torch.cat(encoder.encode(pixels, self.image_columns), dim=-1)

    @torch.inference_mode()
    def _embedded(
        self, embed: Callable[[Tensor], Tensor], features: Tensor
    ) -> Float32[np.ndarray, "batch dim"]:
        stored = features.to(self.device, torch.float16).float()  # as they would lie in a store
        embeddings: np.ndarray = F.normalize(embed(stored).float(), dim=-1).cpu().numpy()
        return embeddings

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The frozen text encoder, as it is loaded for extraction.

        Raises:
            EvaluationError: The run file does not have it, or it is another than the head's.
        """
        name, settings = self.text_settings
        encoder = load_text_encoder(name, settings, self.device)
        for each in self.checkpoint.columns("text"):
            found = encoder.fingerprints[f"text/{each['name']}"]
            self._check(f"encoders.text.{name}", found, each)
        return encoder

    @cached_property
    def _text_places(self) -> Int64[Tensor, "dim"]:
        """Which of the numbers that the text encoder gives the head reads, in their order."""
        columns = self.text_encoder.columns
        numbers = torch.split(torch.arange(self.text_encoder.dim), [each.dim for each in columns])
        places = {each.name: of for each, of in zip(columns, numbers, strict=True)}
        return torch.cat([places[each["name"]] for each in self.checkpoint.columns("text")])

    def with_image_encoder(self, **changes: Any) -> "Aligned":
        """Return the same model with fields of its loaded image encoder changed."""
        other = replace(self)
        other.__dict__["image_encoder"] = replace(self.image_encoder, **changes)  # as if loaded
        return other

    def on_device(self, device: torch.device) -> "Aligned":
        """Return the same model on another device, where it computes in the same types."""
        (image, image_settings), (text, text_settings) = self.image_settings, self.text_settings
        precision = {"precision": self.image_columns[0].fingerprint["dtype"]}
        images = self.encoders.image | {image: image_settings.model_copy(update=precision)}
        precision = {"precision": self.text_encoder.fingerprint["dtype"]}
        texts = {text: text_settings.model_copy(update=precision)}
        encoders = self.encoders.model_copy(update={"image": images, "text": texts})
        model = deepcopy(self.model).to(device)
        return replace(self, encoders=encoders, model=model, device=device)

    @property
    def image_settings(self) -> tuple[str, ImageEncoderConfig]:
        """Name and settings of the encoder whose own column, or some of `also`, the head reads.

        Raises:
            EvaluationError: The run file does not have it, or the head reads several encoders.
        """
        names = [str(each["name"]) for each in self.checkpoint.columns("image")]
        for name, settings in self.encoders.image.items():
            if {name, *settings.also}.issuperset(names):
                return name, settings
        raise _no_encoder("image", names, self.encoders.image_columns)

    @property
    def text_settings(self) -> tuple[str, TextEncoderConfig]:
        """Name and settings of the text encoder, likewise; of one column, as if it were its own.

        Raises:
            EvaluationError: The run file does not have it, or the head reads several encoders.
        """
        names = [str(each["name"]) for each in self.checkpoint.columns("text")]
        columns = self.encoders.text_columns
        if len(names) == 1 and names[0] in columns:
            return names[0], columns[names[0]]
        for name, settings in self.encoders.text.items():
            if {name, *settings.also}.issuperset(names):
                return name, settings
        raise _no_encoder("text", names, columns)

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


def _bytes(image: Picture) -> bytes:
    """Return an encoded image; of pixels as a PNG file, which loses nothing."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        return _read(image)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if image.mode not in PNG_MODES:
        image = image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=image.getexif())  # which says how a photograph is to be turned
    return buffer.getvalue()


def _read(path: str | Path) -> bytes:
    try:
        return read(Path(path))
    except OSError as error:
        raise EncoderError(
            f"{path} cannot be read: {error.strerror}. An image file was expected. Correct the "
            f"path."
        ) from error


def _no_encoder(kind: str, names: Sequence[str], there: Collection[str]) -> EvaluationError:
    missing = [name for name in names if name not in there]
    if not missing:
        return EvaluationError(
            f"The head reads the columns {', '.join(names)}, of several {kind} encoders. To embed "
            f"what is new, columns of one encoder and its `also` were expected. Train a head on "
            f"such; features that are extracted are embedded as they are."
        )
    name = missing[0]
    return EvaluationError(
        f"The head was trained on the {kind} encoder {name!r}, which the run file does not have. "
        f"It is needed to embed what is new. Add [encoders.{kind}.{name}] to it."
    )
