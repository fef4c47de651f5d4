"""The measures: one file each, and one line in this table.

Plan, stage, settings, report, page and documentation iterate over it, in this order.
"""

from typing import TYPE_CHECKING

from pydantic import create_model

from evaluate.config import EvalSettings
from evaluate.measures.alignment import Alignment
from evaluate.measures.compositional import CompositionalScores
from evaluate.measures.knn import Knn
from evaluate.measures.leaks import Leaks
from evaluate.measures.linear_probe import LinearProbeAccuracy
from evaluate.measures.measure import Measure
from evaluate.measures.multi_label import MultiLabel
from evaluate.measures.retrieval import Retrieval
from evaluate.measures.segmentation import Segmentation
from evaluate.measures.zero_shot import ZeroShot
from evaluate.results import Result

MEASURES: tuple[Measure, ...] = (
    ZeroShot(),
    MultiLabel(),
    Retrieval(),
    Knn(),
    LinearProbeAccuracy(),
    Alignment(),
    CompositionalScores(),
    Segmentation(),
    Leaks(),
)


def measure_of(result: Result) -> Measure | None:
    """Return the measure that a result is of; None for one that this version does not know."""
    return next((measure for measure in MEASURES if measure.owns(result)), None)


if TYPE_CHECKING:
    EvalConfig = EvalSettings
else:
    EvalConfig = create_model(
        "EvalConfig",
        __base__=tuple(measure.settings for measure in MEASURES),
        __doc__=EvalSettings.__doc__,
    )
"""The section `eval` of a run file: the settings of all measures."""
