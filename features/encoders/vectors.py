"""Vectors of texts that were made elsewhere, looked up by their text."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from features.config import VECTORS, ImageEncoderConfig, TextEncoderConfig
from features.encoders.checkpoint import EncoderFiles
from features.encoders.libraries import check_only
from features.encoders.own_functions import BytesOfText, texts_of
from features.encoders.packing import TokenBatch
from features.encoders.plan import Decision, EncoderPlan, file_sha256
from features.encoders.text import TextEncoder, batch_budget
from features.errors import EncoderError

IMAGES = None
TEXTS = "`vectors:FILE.parquet` (a table of texts and their vectors, made elsewhere)"
COLUMNS = ("text", "vector")


def find(model: str, revision: str | None, *, weights: bool = True) -> EncoderFiles | None:  # noqa: ARG001
    """Return None: there is one file, which is read when it is loaded."""
    return None


def is_here(model: str, revision: str | None) -> bool:  # noqa: ARG001
    """Return whether the file is there."""
    return _file(model).is_file()


def missing(model: str) -> tuple[bool, str, str]:
    """Say that the file is not there."""
    return False, f"{_file(model)} is not there", "correct the path, which the run file is beside"


def resolve(config: ImageEncoderConfig | TextEncoderConfig) -> EncoderPlan:
    """Say that vectors are looked up.

    Raises:
        EncoderError: The file is not there, the recipe asks for more, or it is to see images.
    """
    if not isinstance(config, TextEncoderConfig):
        raise EncoderError(
            f"{config.model!r} has vectors of texts, but an image encoder names it. A model of "
            f"images was expected. Choose another, or bring its vectors with `sail import-store`."
        )
    check_only(config, "a table of vectors", pooling="mean")
    file = _file(config.model)
    if not file.is_file():
        raise EncoderError(
            f"{file} is not there. A parquet file with the columns {COLUMNS} was expected. Correct "
            f"`model`."
        )
    decisions = {"vectors": Decision("looked up by their text", file.name)}
    return EncoderPlan("text", config.model, decisions, {file.name: file})


def load_image(
    config: ImageEncoderConfig,
    poolings: frozenset[str],  # noqa: ARG001
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Refuse: there are no vectors of images."""
    raise AssertionError(resolve(config))


def load_text(name: str, config: TextEncoderConfig, device: torch.device) -> TextEncoder:
    """Read a table of vectors as a text encoder.

    Raises:
        EncoderError: It is no such table.
    """
    plan, file = resolve(config), _file(config.model)
    model = LookedUpTexts(file)
    return TextEncoder(
        name=name,
        model=model,
        tokenise=BytesOfText(),
        tokens_per_batch=batch_budget(config, device),
        equal_lengths=False,
        first_position=0,
        device=device,
        dim=model.dim,
        fingerprint={
            "model": f"{VECTORS}{file.name}",
            "sha256": file_sha256(file),
            "licence": None,
            "dim": model.dim,
            "looked_up": True,
        },
        plan=plan,
    )


class LookedUpTexts(nn.Module):
    """The vectors of a table; texts come as bytes."""

    def __init__(self, file: Path) -> None:
        """Read the table.

        Args:
            file: Parquet, with a column `text` of strings and a column `vector` of lists of numbers
                (float16, float32 or float64), all of one length.
        """
        super().__init__()
        self.file = file
        try:
            table = pq.read_table(file, columns=list(COLUMNS))
            self.texts = [str(text) for text in table["text"].to_pylist()]
            self.vectors = _matrix(table["vector"])
            self.rows = _numbered(self.texts)
        except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
            raise EncoderError(
                f"{file} is no table of vectors: {error}. A parquet file with the columns `text` "
                f"(strings) and `vector` (lists of numbers of one length, all finite) was "
                f"expected. Write it anew."
            ) from error
        self.dim = self.vectors.shape[1]

    def forward(self, batch: TokenBatch) -> Float[Tensor, "sequences dim"]:
        """Return the vector of each text.

        Raises:
            EncoderError: There is none for one of them.
        """
        texts = texts_of(batch)
        if missing := [text for text in texts if text not in self.rows]:
            raise EncoderError(
                f"{self.file} has no vector for the text {missing[0]!r} ({len(missing)} of "
                f"{len(texts)} are missing). A row for each text was expected. Add it, made by the "
                f"model that made the other vectors."
            )
        rows = [self.rows[text] for text in texts]
        return torch.from_numpy(self.vectors[rows]).to(batch.ids.device)


def _numbered(texts: list[str]) -> dict[str, int]:
    rows: dict[str, int] = {}
    for row, text in enumerate(texts):
        if rows.setdefault(text, row) != row:
            raise ValueError(f"the text {text!r} comes twice")
    return rows


def _matrix(column: pa.ChunkedArray) -> Float32[np.ndarray, "texts dim"]:
    rows = [np.asarray(row, dtype=np.float32) for row in column.to_pylist()]
    lengths = {len(row) for row in rows}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"its vectors have the lengths {sorted(lengths)[:5]}")
    matrix = np.stack(rows)
    if not np.isfinite(matrix).all():
        raise ValueError("a vector is not finite")
    return matrix


def _file(model: str) -> Path:
    return Path(model.removeprefix(VECTORS)).expanduser()
