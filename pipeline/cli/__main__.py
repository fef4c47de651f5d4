"""`python -m pipeline.cli` is `sail`."""

from pipeline.cli import cli

cli()
