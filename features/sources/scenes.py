"""The demo world as a source: drawn into tar shards, which are then read as any others."""

import logging
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from features.sources.base import NONE, Known, SourceReader, SourceSettings
from features.sources.webdataset import WebdatasetSource

logger = logging.getLogger(__name__)
FIELDS = ("short", "long")


class ScenesSource(SourceSettings):
    """The bundled demo world: drawn into tar shards in the run directory, then read as such."""

    rows: PositiveInt
    """How many pictures to draw."""
    kind: Literal["scenes"]
    split: Literal["train", "test", "compositional"]
    """Which part of the world: `train` never shows the held-out combinations."""
    seed: int = Field(default=0, ge=0)
    """Seed of the drawing."""

    unused = frozenset({"captions", "label", "group", "class_names", "share"})

    @model_validator(mode="after")
    def _pairs_are_whole(self) -> "ScenesSource":
        if self.split == "compositional" and self.rows % 2:
            raise ValueError(f"rows = {self.rows} is odd, but 'compositional' has pairs; add one")
        return self

    def open(self, known: Known = NONE, *, folder: Path | None = None) -> SourceReader[Any]:
        """Draw what is not there yet, and open the shards."""
        from features.scenes.shards import write_shards

        if folder is None:
            raise ValueError("a source of kind 'scenes' needs a folder to draw into")
        started = time.monotonic()
        write_shards(folder, split=self.split, rows=self.rows, seed=self.seed)
        seconds = time.monotonic() - started
        logger.info("drawing %d scenes of %s took %.1f s", self.rows, self.split, seconds)
        shards = WebdatasetSource(
            kind="webdataset",
            path=str(folder / "*.tar"),
            captions=FIELDS,
            class_names=folder / "classes.txt",
        )
        return shards.open(known)

    @property
    def known_rows(self) -> int:
        """How many pictures there will be."""
        return self.rows

    @property
    def expected_fields(self) -> tuple[str, ...]:
        """Both captions."""
        return FIELDS

    def summary(self) -> str:
        """Say how many scenes there will be."""
        return f"{self.rows} scenes, drawn when they are needed"
