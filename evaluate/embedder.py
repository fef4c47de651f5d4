"""Rows of a store as vectors: frozen features, or embeddings by the trained head."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float16, Int64
from torch import Tensor
from torch.nn import functional as F

from align.checkpoint import Checkpoint
from align.heads import AlignmentModel
from features.config import VECTORS, TextEncoderConfig
from features.errors import EvaluationError, UnusableSplitError
from features.storage.column import Column
from features.storage.files import appearing
from features.storage.fingerprint import Fingerprint
from features.storage.reading import read_kept, seal
from features.store import FeatureStore

ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Embedded:
    """The embeddings of the rows of a column that are ok."""

    rows: Int64[np.ndarray, "ok"]
    """Rows of the store, in order."""
    vectors: Float[Tensor, "ok dim"]
    """Normalised."""

    def at(self, rows: Int64[np.ndarray, "*shape"]) -> Float[Tensor, "*shape dim"]:
        """Return the vectors of rows of the store, which must be among those here."""
        places = torch.from_numpy(np.searchsorted(self.rows, rows))
        return self.vectors[places.to(self.vectors.device)]


@dataclass(frozen=True)
class Embedder:
    """The trained head over the stores of a run; what it embedded once it remembers."""

    model: AlignmentModel
    checkpoint: Checkpoint
    device: torch.device
    _known: dict[str, Embedded] = field(default_factory=dict)

    @property
    def image(self) -> str:
        """Name of the image encoder."""
        return str(self.checkpoint.image["name"])

    @property
    def text(self) -> str:
        """Name of the text encoder."""
        return str(self.checkpoint.text["name"])

    def images(self, store: FeatureStore) -> Embedded:
        """Embed the images of a store."""
        return self._embedded(store, self.image_column(store), self.model.embed_image)

    def captions(self, store: FeatureStore, name: str) -> Embedded:
        """Embed one caption field of a store."""
        return self._embedded(store, self.text_column(store, name), self.model.embed_text)

    def image_column(self, store: FeatureStore) -> Column:
        """Open the features that the head's image side reads.

        Raises:
            EvaluationError: They are not all there, or are of another encoder.
        """
        return self._opened(store, f"image/{self.image}")

    def text_column(self, store: FeatureStore, name: str) -> Column:
        """Open the features of one caption field that the head's text side reads.

        Raises:
            EvaluationError: They are not all there, or are of another encoder.
        """
        return self._opened(store, f"text/{self.text}/{name}")

    def blocks(
        self, column: Column, rows: Int64[np.ndarray, "rows"]
    ) -> Iterator[Float[np.ndarray, "batch dim"]]:
        """Yield the embeddings of rows in order, one block at a time."""
        is_image = column.name.startswith("image/")
        embed = self.model.embed_image if is_image else self.model.embed_text
        for features in column.blocks(rows):
            yield self.apply(embed, features).cpu().numpy()

    @torch.no_grad()
    def apply(
        self, embed: Callable[[Tensor], Tensor], features: Float16[np.ndarray, "batch dim"]
    ) -> Float[Tensor, "batch out"]:
        """Embed and normalise some features."""
        return F.normalize(embed(torch.from_numpy(features).to(self.device)).float(), dim=-1)

    def _embedded(
        self, store: FeatureStore, column: Column, embed: Callable[[Tensor], Tensor]
    ) -> Embedded:
        key = f"{store.path}/{column.name}"
        if key not in self._known:
            rows = column.ok_rows()
            blocks = [self.apply(embed, block) for block in column.blocks(rows)]
            if not blocks:
                raise UnusableSplitError(
                    f"{key} has no row that is ok. At least one was expected. See why with `sail "
                    f"inspect {store.path}`, or name other splits in [eval]."
                )
            self._known[key] = Embedded(rows, torch.cat(blocks))
        return self._known[key]

    def _opened(self, store: FeatureStore, name: str) -> Column:
        """Open a column, or several side by side, each as the head was trained on it."""
        opened = store.column(name)
        kind: Literal["image", "text"] = "image" if name.startswith("image/") else "text"
        known = self.checkpoint.columns(kind)
        for column, trained_on in zip(opened.parts, known, strict=True):
            _check_complete(column)
            for place, value, expected in column.fingerprint.differences(trained_on["fingerprint"]):
                raise EvaluationError(
                    f"{column.path} has {place} = {value!r}, but the head was trained on features "
                    f"with {expected!r}. Features of the same encoder were expected. Extract them "
                    f"again, or train a head on these."
                )
        return opened


def complete_column(store: FeatureStore, name: str) -> Column:
    """Open a column of which every chunk is done.

    Raises:
        StoreError: There is none of that name.
        EvaluationError: It has chunks that are not done.
    """
    column = store.column(name)
    _check_complete(column)
    return column


def _check_complete(column: Column) -> None:
    if pending := column.pending():
        raise EvaluationError(
            f"{column.path} has {len(pending)} chunks that are not done. A complete column "
            f"was expected. Finish it with `sail extract`."
        )


def check_same_encoder(
    section: str,
    found: dict[str, object],
    expected: dict[str, object],
    *,
    dim: int,
    remedy: str = "Correct the run file.",
) -> None:
    """Check that an encoder of the run file is the one that a head was trained on.

    Args:
        section: Of the run file, for the message.
        found: Fingerprint of the encoder as it was loaded.
        expected: What the checkpoint of the head says. Of imported features that is what was told
            of them.
        dim: Length of the features that the head reads.
        remedy: What to do where they differ.

    Raises:
        EvaluationError: They differ in what decides the features.
    """
    if expected.get("imported"):
        known = {} if found.get("looked_up") else expected
        expected = {name: value for name, value in known.items() if name != "imported"}
        found = {name: found.get(name) for name in expected} | {"dim": found["dim"]}
    expected = {**expected, "dim": dim}
    for place, value, wanted in Fingerprint(found).differences(expected):
        raise EvaluationError(
            f"[{section}] has {place} = {value!r}, but the head was trained with {wanted!r}. "
            f"The same encoder was expected. {remedy}"
        )


def looked_up_in(encoders: Mapping[str, TextEncoderConfig]) -> list[str]:
    """Return the sha256 of each table in which vectors of texts are looked up."""
    names = [each.model for each in encoders.values() if each.model.startswith(VECTORS)]
    files = [Path(name.removeprefix(VECTORS)) for name in names]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]


def prompt_features(
    encoders: Mapping[str, TextEncoderConfig], embedder: Embedder, prompts: list[str], cache: Path
) -> Float16[np.ndarray, "prompts dim"]:
    """Return the frozen features of prompts, from the cache if they were encoded before.

    Those of several columns lie side by side.

    Args:
        encoders: Settings of the text encoders of the recipe.
        embedder: Says of what encoder the features must be.
        prompts: Sentences.
        cache: Folder for the features, one file per list of prompts and encoder.

    Raises:
        EvaluationError: The recipe's text encoder is not the one that the head was trained on.
    """
    parts = [
        _column_of_prompts(encoders, each, embedder.device, prompts, cache)
        for each in embedder.checkpoint.columns("text")
    ]
    return np.concatenate(parts, axis=1)


def _column_of_prompts(
    encoders: Mapping[str, TextEncoderConfig],
    column: Mapping[str, Any],
    device: torch.device,
    prompts: list[str],
    cache: Path,
) -> Float16[np.ndarray, "prompts dim"]:
    compared = Fingerprint(column["fingerprint"]).deciding
    made_of = [compared, prompts, *looked_up_in(encoders)]
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    path = cache / f"prompts-{digest[:16]}.npy"
    dim = int(column["dim"])
    if (kept := read_kept(path, (len(prompts), dim))) is not None:
        return np.array(kept)
    name = str(column["name"])
    if name not in encoders:
        raise EvaluationError(
            f"The head was trained on the text encoder {name!r}, which the recipe does not have. "
            f"Zero-shot prompts must be encoded by it. Add [encoders.text.{name}]."
        )
    from features.encoders import load_text_encoder  # slow to import, and mostly not needed

    encoder = load_text_encoder(name, encoders[name], device)
    check_same_encoder(f"encoders.text.{name}", encoder.fingerprint, compared, dim=dim)
    features: np.ndarray = encoder.encode(prompts).astype(np.float16)
    with appearing(path) as partial:
        with partial.open("wb") as file:
            np.save(file, features, allow_pickle=False)
        seal(partial, path.name)
    return features
