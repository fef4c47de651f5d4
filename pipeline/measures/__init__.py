"""The measures on the stores of a run: which rows, which vectors, and what is found."""

from pipeline.measures.alignment import score_alignment
from pipeline.measures.compositional import score_compositional
from pipeline.measures.context import Context, Findings
from pipeline.measures.knn import score_knn
from pipeline.measures.linear_probe import score_linear_probe
from pipeline.measures.retrieval import score_retrieval
from pipeline.measures.segmentation import score_segmentation
from pipeline.measures.zero_shot import score_zero_shot

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
