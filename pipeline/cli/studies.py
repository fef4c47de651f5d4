"""The commands of `sail` that train many heads, and compare them.

Nothing heavy is imported at the top, so that `sail --help` answers at once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pipeline.cli.options import (
    NamedRun,
    Stage,
    count_of,
    json_option,
    say,
    say_json,
    say_paths,
    seeds_of,
    settings_of,
    stage,
)

on = click.option(
    "--on",
    metavar="SPLIT",
    help="Score alignment on this split; on the rows that training holds out if not given.",
)


@click.command()
@click.argument("first", metavar="RUN", type=NamedRun())
@click.argument("second", metavar="RUN", type=NamedRun())
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE.png",
    help="Where the picture goes; eval/compare.png of the second run if not given.",
)
@json_option
def compare(first: Path, second: Path, plot: Path | None, as_json: bool) -> None:
    """Compare the results of two runs, number by number.

    RUN is an evaluated run. Differences are second − first, with the 95 % interval
    of a paired bootstrap over the test items. Refused where rows or protocol differ.

    \b
    Example:
      sail compare runs/demo runs/linear --plot linear-or-not.png
    """
    from pipeline.study.comparison import compare_runs, comparison_plot, comparison_table

    document = compare_runs(first, second)
    picture = plot or second / "eval" / "compare.png"
    comparison_plot(document, picture)
    if as_json:
        say_json(document, indent=2)
    else:
        say(comparison_table(document))
        say_paths([picture])


@click.command()
@stage
@on
@click.option(
    "--scores",
    type=click.Path(path_type=Path),
    metavar="FILE.csv",
    help="Scores from elsewhere: a column `encoder`, and one per score.",
)
def study(run: Stage, on: str | None, scores: Path | None) -> None:
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

    path = run.run(lambda config, stop: study_run(config, stop, on=on, scores=scores))
    run.show(path, study_table, path.with_suffix(".md"))


@click.command()
@stage
@on
def pick(run: Stage, on: str | None) -> None:
    """Say which pair of encoders aligns best, and how surely.

    Needs `sail extract` of a few thousand of your pairs with all candidates. Trains a short linear
    head for each pair. Resumes by itself, and shares what it trains with `sail study`.

    \b
    Example:
      sail pick candidates.toml --set align.steps=200
    """
    from pipeline.study import pick_run
    from pipeline.study.outcome import pick_table

    path = run.run(lambda config, stop: pick_run(config, on, stop))
    run.show(path, pick_table, path)


def trainings(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the recipe, and the options of those that train many heads."""
    function = click.option(
        "--eval", "evaluates", is_flag=True, help="Measure each head by `sail eval` too."
    )(stage(function))
    return click.option(
        "--seeds", default="0,1,2", show_default=True, help="Each is trained with all of these."
    )(function)


@click.command()
@click.option(
    "--over",
    multiple=True,
    required=True,
    metavar="KEY=VALUE,VALUE,…",
    help="A setting of [align] and its values; may be repeated.",
)
@trainings
def sweep(run: Stage, over: tuple[str, ...], seeds: str, evaluates: bool) -> None:
    """Train every combination of some settings, and compare them.

    On the features that the run has. Resumes by itself. Prints mean and sd of the held-out recall
    over the seeds; sweep.json and sweep.png are in run.dir/sweep.

    \b
    Example:
      sail sweep demo --over align.head.kind=glu,linear --over align.head.dim=128,256
    """
    _sweep(run, "sweep", settings_of(over), seeds, evaluates=evaluates)


@click.command()
@click.option("--rows", required=True, metavar="1k,3k,…", help="Numbers of pairs to train on.")
@trainings
def scaling(run: Stage, rows: str, seeds: str, evaluates: bool) -> None:
    """Train on more and more pairs, and draw the quality.

    On the features that the run has. A larger number holds all pairs of a smaller one. Resumes by
    itself; scaling.json and scaling.png are in run.dir/scaling.

    \b
    Example:
      sail scaling demo --rows 1500,3k,5k --eval
    """
    sizes = [str(count_of(each)) for each in rows.split(",")]
    _sweep(run, "scaling", {"align.rows": sizes}, seeds, evaluates=evaluates)


def _sweep(
    run: Stage, name: str, over: dict[str, list[str]], seeds: str, *, evaluates: bool
) -> None:
    from pipeline.study.sweep import Sweep, sweep_run, sweep_table

    varied = Sweep(name, over, seeds_of(seeds), evaluates)
    path = run.run(lambda config, stop: sweep_run(varied, config, stop))
    run.show(path, sweep_table, path, path.with_suffix(".png"))
