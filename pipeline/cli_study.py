"""The commands of `sail` that set runs and encoders side by side.

Nothing heavy is imported at the top, so that `sail --help` answers at once.
"""

import json
from pathlib import Path

import click


@click.command()
@click.argument("first", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("second", metavar="RUN", type=click.Path(path_type=Path))
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE.png",
    help="Where the picture goes; eval/compare.png of the second run if not given.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(first: Path, second: Path, plot: Path | None, as_json: bool) -> None:
    """Compare what `sail eval` found in two runs, number by number.

    RUN is the folder of an evaluated run. Differences are second − first, with the 95 % interval
    of a paired bootstrap over the test items. Refused where rows or protocol differ.

    \b
    Example:
      sail compare runs/demo runs/linear --plot linear-or-not.png
    """
    from pipeline.comparison import compare_runs, comparison_plot, comparison_table

    document = compare_runs(first, second)
    picture = plot or second / "eval" / "compare.png"
    comparison_plot(document, picture)
    click.echo(
        json.dumps(document, indent=2, ensure_ascii=False)
        if as_json
        else f"{comparison_table(document)}\n{picture}"
    )
