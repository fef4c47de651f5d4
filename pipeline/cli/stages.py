"""The three stages: `sail extract`, `sail align`, `sail eval`.

Nothing heavy is imported at the top, so that `sail --help` answers at once.
"""

import json
from pathlib import Path
from typing import Any

import click

from pipeline.cli.options import run_stage, stage


@click.command()
@stage
@click.option(
    "--append", is_flag=True, help="Add rows that came since the source was indexed, at the end."
)
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Let the workers of a Dask cluster encode: tcp://HOST:PORT, or a scheduler file.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Let so many processes of this machine encode, one per GPU where there are several.",
)
def extract(
    recipe: str,
    overrides: tuple[str, ...],
    as_json: bool,
    verbose: bool,
    append: bool,
    scheduler: str | None,
    workers: int | None,
) -> None:
    """Encode images and captions into feature stores (stage one).

    Resumes by itself: what is on disk is not computed again, also where the recipe has further
    encoders or caption fields. Prints the path of each store.
    docs/scaling.md tells how to use many GPUs or machines.

    \b
    Examples:
      sail extract demo
      sail extract my.toml --append
      sail extract my.toml --set encoders.image.dinov2.batch_size=256
      sail extract my.toml --scheduler tcp://10.0.0.1:8786
    """
    from pipeline.run import extract as stage

    if scheduler is not None and workers is not None:
        raise click.UsageError("--scheduler has workers of its own: leave --workers out.")

    def work(config: Any, stop: Any) -> list[str]:
        stores = stage.extract(config, stop, append=append, scheduler=scheduler, workers=workers)
        return [str(path) for path in stores]

    run_stage(recipe, overrides, work, as_json=as_json, verbose=verbose)


@click.command()
@stage
def align(recipe: str, overrides: tuple[str, ...], as_json: bool, verbose: bool) -> None:
    """Train the head on the feature stores (stage two).

    Resumes by itself from its last checkpoint. Prints the path of the best checkpoint. Several
    processes, on as many GPUs, train one head under torchrun.

    \b
    Examples:
      sail align demo
      sail align my.toml --set align.head.kind=linear --set run.seed=1
      torchrun --nproc-per-node 4 -m pipeline.cli align my.toml
    """
    from pipeline.run.align import align_run

    def work(config: Any, stop: Any) -> list[str] | None:
        best = align_run(config, stop)
        return None if best is None else [str(best)]

    run_stage(recipe, overrides, work, as_json=as_json, verbose=verbose)


@click.command(name="eval")
@click.option(
    "--check",
    is_flag=True,
    help="Instead, embed some rows in several ways and see how far the embeddings drift.",
)
@stage
def evaluate(
    recipe: str, overrides: tuple[str, ...], as_json: bool, verbose: bool, check: bool
) -> None:
    """Measure the trained head; write its results and report.

    Prints a table, and the paths of results.json and report.html in run.dir/eval.

    --check tells how far embeddings drift with batch size, padding, image mode and device, and
    from the store; check.json is beside those. Exit 1 above eval.check.tolerance.

    \b
    Examples:
      sail eval demo
      sail eval my.toml --json | jq '.results[] | [.task, .metric, .value]'
      sail eval my.toml --check
    """
    if check:
        _check(recipe, overrides, as_json=as_json, verbose=verbose)
        return
    from pipeline.run.evaluate import evaluate_run, results_table

    def work(config: Any, stop: Any) -> Path:
        return Path(evaluate_run(config, stop))

    results = run_stage(recipe, overrides, work, as_json=None, verbose=verbose)
    if as_json:
        click.echo(results.read_text(encoding="utf-8"))
    else:
        click.echo(results_table(results))
        click.echo(f"{results}\n{results.with_name('report.html')}")


def _check(recipe: str, overrides: tuple[str, ...], *, as_json: bool, verbose: bool) -> None:
    from pipeline.run.check import check_run, refuse_drift
    from pipeline.tables import drift_table

    kept = "nothing was written."
    path = run_stage(recipe, overrides, check_run, as_json=None, verbose=verbose, kept=kept)
    text = path.read_text(encoding="utf-8")
    document = json.loads(text)
    click.echo(text if as_json else f"{drift_table(document)}\n{path}")
    refuse_drift(document)
