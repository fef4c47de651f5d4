"""Settings of the evaluations."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

SETTINGS = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class EvalConfig(BaseModel):
    """Which measures are taken on which splits; each runs where a split has what it needs."""

    model_config = SETTINGS

    checkpoint: Literal["best", "last"] = "best"
    """Which checkpoint of `sail align` to evaluate."""
    retrieval: tuple[str, ...] = ()
    """Splits for image–text retrieval; every split but the training split, those with labels only
    and those with groups, if empty."""
    retrieval_fields: tuple[str, ...] = ()
    """Caption fields that are searched; all if empty. Fields that have names rather than numbers
    are also scored one by one."""
    retrieval_positives: Literal["own", "identical"] = "own"
    """`own`: only an image's own captions are right (the usual protocol). `identical`: also those
    of other images with the same words, for captions that repeat."""
    zero_shot: tuple[str, ...] = ()
    """Splits for zero-shot classification; every labelled split but the training split and those
    with groups, if empty."""
    templates: tuple[str, ...] | str = ("a photo of a {}.",)
    """Prompts for a class name; their embeddings are averaged. A list, the name of a data set whose
    prompts ship with the program (`imagenet-1k`: the 80 of CLIP; docs/datasets.md has all), or a
    JSON file `{"templates": […]}`."""
    split_templates: dict[str, tuple[str, ...] | str] = {}
    """Prompts for splits that have their own, in the same three forms."""
    knn: tuple[str, ...] = ()
    """Splits for k-NN classification (queries); every labelled split with the classes of the
    reference but the training split, the reference and those with groups, if empty."""
    knn_reference: str | None = None
    """Labelled split whose rows vote; the training split if not given."""
    knn_k: tuple[PositiveInt, ...] = (10, 20, 100, 200)
    """Numbers of neighbours that are tried."""
    knn_temperature: PositiveFloat = 0.07
    """T of the votes exp(cosine / T) (DINO)."""
    compositional: tuple[str, ...] = ()
    """Splits with groups; every such split if empty."""
    compositional_fields: tuple[str, ...] = ()
    """Caption fields that are compared; all in which the captions of a group differ if empty."""
    bootstrap: int = Field(default=1000, ge=0)
    """Resamples for the 95 % intervals; 0 leaves them out."""
    examples: PositiveInt = 6
    """Right and wrong retrieval examples shown in the report, each."""
    seed: int = 0
    """Seed of the resampling and of the choice of examples."""
