"""Settings of the evaluations."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

SETTINGS = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


AlignmentMeasure = Literal["cka", "cka_debiased", "cka_rbf", "mutual_knn", "cknna", "svcca"]


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
    linear_probe_rows: int = Field(default=0, ge=0)
    """Rows of `knn_reference` to which linear probes of the image features are fitted, at most; the
    splits of `knn` test them. 0 leaves them out: to converge takes minutes on a CPU."""
    alignment: tuple[str, ...] = ()
    """Splits on whose pairs the alignment of image with text features is measured; every split with
    captions but the training split and those with groups, if empty."""
    alignment_measures: tuple[AlignmentMeasure, ...] = (
        "cka",
        "cka_debiased",
        "mutual_knn",
        "cknna",
    )
    """Measures of alignment (docs/protocols.md); none if empty. `cka_rbf` and `svcca` take the
    longest."""
    alignment_rows: PositiveInt = 1024
    """Pairs, drawn by `seed`, on which alignment is measured, at most. Values of mutual k-NN and
    CKNNA depend on it: compare only values of as many."""
    alignment_k: PositiveInt = 10
    """Neighbours of mutual k-NN and CKNNA; two at least for CKNNA."""
    alignment_permutations: int = Field(default=20, ge=0)
    """How often pairs are shuffled for the null of an alignment measure; 0 leaves it out."""
    alignment_subsamples: int = Field(default=20, ge=0)
    """Halves of the rows for its 95 % interval; 0 leaves it out."""
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
