"""The commands of `sail` that train many heads, and compare them.

Nothing heavy is imported at the top, so that `sail --help` answers at once.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pipeline.cli.options import (
    count_of,
    run_stage,
    seeds_of,
    settings_of,
    stage,
    trainings,
    until_stopped,
)


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
    """Compare the results of two runs, number by number.

    RUN is the folder of an evaluated run. Differences are second − first, with the 95 % interval
    of a paired bootstrap over the test items. Refused where rows or protocol differ.

    \b
    Example:
      sail compare runs/demo runs/linear --plot linear-or-not.png
    """
    from pipeline.study.comparison import compare_runs, comparison_plot, comparison_table

    document = compare_runs(first, second)
    picture = plot or second / "eval" / "compare.png"
    comparison_plot(document, picture)
    click.echo(
        json.dumps(document, indent=2, ensure_ascii=False)
        if as_json
        else f"{comparison_table(document)}\n{picture}"
    )


on = click.option(
    "--on",
    metavar="SPLIT",
    help="Score alignment on this split; on the rows that training holds out if not given.",
)


@click.command()
@stage
@on
@click.option(
    "--scores",
    type=click.Path(path_type=Path),
    metavar="FILE.csv",
    help="Scores from elsewhere: a column `encoder`, and one per score.",
)
def study(
    recipe: str,
    overrides: tuple[str, ...],
    as_json: bool,
    verbose: bool,
    on: str | None,
    scores: Path | None,
) -> None:
    """Find out what predicts alignment, over many encoders.

    Needs `sail extract`. Measures every image encoder and every pair, trains a short linear head
    for each pair, and correlates. Resumes by itself. Writes study.json, study.md and study.png
    into run.dir/study; docs/study.md has an example.

    \b
    Examples:
      sail study flickr-study.toml
      sail study flickr-study.toml --on val --scores mteb.csv
    """
    from pipeline.study import study_run
    from pipeline.study.outcome import study_table

    path = _stoppable(
        lambda stop: study_run(recipe, overrides, stop, on=on, scores=scores), verbose=verbose
    )
    text = path.read_text(encoding="utf-8")
    click.echo(text if as_json else f"{study_table(json.loads(text))}\n{path.with_suffix('.md')}")


@click.command()
@stage
@on
def pick(
    recipe: str, overrides: tuple[str, ...], as_json: bool, verbose: bool, on: str | None
) -> None:
    """Say which pair of encoders aligns best, and how surely.

    Needs `sail extract` of a few thousand of your pairs with all candidates. Trains a short linear
    head for each pair. Resumes by itself, and shares what it trains with `sail study`.

    \b
    Example:
      sail pick candidates.toml --set align.steps=200
    """
    from pipeline.study import pick_run
    from pipeline.study.outcome import pick_table

    path, document = _stoppable(lambda stop: pick_run(recipe, overrides, on, stop), verbose=verbose)
    click.echo(json.dumps(document, indent=2) if as_json else f"{pick_table(document)}\n{path}")


def _stoppable(work: Callable[[Any], Any], *, verbose: bool) -> Any:
    from pipeline.progress import start_log
    from pipeline.run.cpu import keep_freed_memory

    start_log(verbose=verbose)
    keep_freed_memory()
    return until_stopped(work)


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
    from pipeline.study.sweep import Sweep, sweep_run, sweep_table

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
