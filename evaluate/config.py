"""Settings that all measures share; each measure adds its own to them (`evaluate.measures`)."""

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, Field, PositiveFloat, PositiveInt

from features.config import SETTINGS, EachOnce

Names = Annotated[tuple[str, ...], EachOnce]
Settings = TypeVar("Settings", bound="EvalSettings")
Score = Literal["csls", "inverted-softmax", "dual-bank"]
"""What `evaluate.hubness` makes of cosines with the help of a bank of training rows."""


class CheckConfig(BaseModel):
    """What `sail eval --check` embeds anew, and how much drift it accepts."""

    model_config = SETTINGS

    rows: PositiveInt = 256
    """Rows, drawn by `eval.seed`."""
    tolerance: PositiveFloat = 1e-3
    """1 − the cosine of an embedding with itself, embedded in another way, at most."""


class EvalSettings(BaseModel):
    """Which measures are taken on which splits; each runs where a split has what it needs."""

    model_config = SETTINGS

    checkpoint: Literal["best", "last"] = "best"
    """Which checkpoint of `sail align` to evaluate."""
    check: CheckConfig = CheckConfig()
    """Of `sail eval --check`."""
    bootstrap: int = Field(default=1000, ge=0)
    """Resamples for the 95 % intervals; 0 leaves them out."""
    examples: PositiveInt = 6
    """Right and wrong retrieval examples shown in the report, each; segmented pictures, of each
    data set."""
    seed: int = Field(default=0, ge=0)
    """Seed of the resampling and of the choice of examples."""

    def of(self, settings: type[Settings]) -> Settings:
        """Return this section as the settings of one measure, which are a part of it."""
        if not isinstance(self, settings):
            raise TypeError(f"{type(self).__name__} has no {settings.__name__}")
        return self
