"""What predicts alignment (`sail study`), and which pair of encoders to take (`sail pick`)."""

from pipeline.study.outcome import pick_run, study_run

__all__ = ["pick_run", "study_run"]
