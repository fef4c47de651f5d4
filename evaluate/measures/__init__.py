"""The measures on the stores of a run: which rows, which vectors, and what is found."""

from evaluate.measures.alignment import score_alignment
from evaluate.measures.compositional import score_compositional
from evaluate.measures.context import Context, Findings
from evaluate.measures.knn import score_knn
from evaluate.measures.linear_probe import score_linear_probe
from evaluate.measures.retrieval import score_retrieval
from evaluate.measures.segmentation import score_segmentation
from evaluate.measures.zero_shot import score_zero_shot

__all__ = [
    "Context",
    "Findings",
    "score_alignment",
    "score_compositional",
    "score_knn",
    "score_linear_probe",
    "score_retrieval",
    "score_segmentation",
    "score_zero_shot",
]
