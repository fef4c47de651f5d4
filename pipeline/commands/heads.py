"""The commands of `sail` that read and write heads of the released SAIL code.

Nothing heavy is imported at the top, so that `sail --help` answers at once.
"""

from pathlib import Path
from typing import Any

import click

from pipeline.commands.options import run_stage, stage


@click.command(name="import-head")
@click.argument("file", type=click.Path(path_type=Path))
@stage
def import_head(
    file: Path, recipe: str, overrides: tuple[str, ...], as_json: bool, verbose: bool
) -> None:
    """Make a released SAIL head the checkpoint of a run.

    FILE is its .pt; `sail eval` measures it there. The recipe's features must be extracted, by the
    encoders that the head was trained on. Nothing in the file is run. Prints the path of the
    checkpoint.

    \b
    Example:
      sail import-head sail_dinov2l_nv2.pt sail-paper --set run.dir=runs/released
      sail eval sail-paper --set run.dir=runs/released
    """
    from pipeline.training import heads

    def work(config: Any, _stop: Any) -> list[str]:
        return [str(heads.import_head(file, config))]

    run_stage(recipe, overrides, work, as_json=as_json, verbose=verbose)


@click.command(name="export-head")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
def export_head(checkpoint: Path, file: Path) -> None:
    """Write a head in the layout of the released SAIL code.

    CHECKPOINT is the folder of a run or of one of its checkpoints. Heads of kind star, mlp and
    linear have a place in that layout. Prints the path of FILE.

    \b
    Example:
      sail export-head runs/sail-paper sail.pt
    """
    from pipeline.training import heads

    click.echo(heads.export_head(checkpoint, file))
