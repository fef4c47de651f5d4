"""What predicts alignment (`sail study`), and which pair of encoders to take (`sail pick`)."""

from pipeline.study.outcome import study_run
from pipeline.study.pick import pick_run

__all__ = ["pick_run", "study_run"]
