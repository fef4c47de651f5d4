"""The commands of `sail` that train many heads, and compare them.

Nothing heavy is imported at the top, so that `sail --help` answers at once.
"""

import json
from pathlib import Path
from typing import Any

import click

from pipeline.commands.options import run_stage, stage, trainings
from pipeline.commands.values import count_of, seeds_of, settings_of


@click.command()
@click.option(
    "--over",
    multiple=True,
    required=True,
    metavar="KEY=VALUE,VALUE,…",
    help="A setting of [align] and its values; may be repeated.",
)
@trainings
@stage
def sweep(over: tuple[str, ...], **options: Any) -> None:
    """Train every combination of some settings, and compare them.

    On the features that the run has. Resumes by itself. Prints mean and sd of the held-out recall
    over the seeds; sweep.json and sweep.png are in run.dir/sweep.

    \b
    Example:
      sail sweep demo --over align.head.kind=glu,linear --over align.head.dim=128,256
    """
    _run_sweep("sweep", settings_of(over), **options)


@click.command()
@click.option("--rows", required=True, metavar="1k,3k,…", help="Numbers of pairs to train on.")
@trainings
@stage
def scaling(rows: str, **options: Any) -> None:
    """Train on more and more pairs, and draw the quality.

    On the features that the run has. A larger number holds all pairs of a smaller one. Resumes by
    itself; scaling.json and scaling.png are in run.dir/scaling.

    \b
    Example:
      sail scaling demo --rows 1500,3k,5k --eval
    """
    sizes = [str(count_of(each)) for each in rows.split(",")]
    _run_sweep("scaling", {"align.rows": sizes}, **options)


def _run_sweep(
    name: str,
    over: dict[str, list[str]],
    *,
    seeds: str,
    evaluates: bool,
    recipe: str,
    overrides: tuple[str, ...],
    as_json: bool,
    verbose: bool,
) -> None:
    from pipeline.training.sweep import Sweep, sweep_run
    from pipeline.training.sweep_output import sweep_table

    varied = Sweep(name, over, seeds_of(seeds), evaluates)

    def work(_config: Any, stop: Any) -> Path:
        return sweep_run(varied, recipe, overrides, stop)

    path = run_stage(recipe, overrides, work, as_json=None, verbose=verbose)
    text = path.read_text(encoding="utf-8")
    if as_json:
        click.echo(text)
    else:
        click.echo(sweep_table(json.loads(text)))
        click.echo(f"{path}\n{path.with_suffix('.png')}")
