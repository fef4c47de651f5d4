"""A small run, aligned."""

from pathlib import Path

from pipeline.interrupt import StopRequest
from pipeline.run.align import align_run
from pipeline.run.config import load_config
from pipeline.run.extract import extract
from tests import tiny


def trained(folder: Path, *overrides: str) -> Path:
    """Extract and align the tiny world; returns the folder of the run."""
    config = load_config(str(tiny.world(folder, rows=24)), overrides)
    extract(config, StopRequest())
    align_run(config, StopRequest())
    return config.run.dir
