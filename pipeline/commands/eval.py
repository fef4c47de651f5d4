"""The command that measures a trained head: `sail eval`.

Nothing heavy is imported at the top, so that `sail --help` answers at once.
"""

import json
from pathlib import Path
from typing import Any

import click

from pipeline.commands.options import run_stage, stage


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
    from pipeline.evaluation.stage import evaluate_run, results_table

    def work(config: Any, stop: Any) -> Path:
        return Path(evaluate_run(config, stop))

    results = run_stage(recipe, overrides, work, as_json=None, verbose=verbose)
    if as_json:
        click.echo(results.read_text(encoding="utf-8"))
    else:
        click.echo(results_table(results))
        click.echo(f"{results}\n{results.with_name('report.html')}")


def _check(recipe: str, overrides: tuple[str, ...], *, as_json: bool, verbose: bool) -> None:
    from pipeline.evaluation.drift import check_run, refuse_drift
    from pipeline.tables import drift_table

    kept = "nothing was written."
    path = run_stage(recipe, overrides, check_run, as_json=None, verbose=verbose, kept=kept)
    text = path.read_text(encoding="utf-8")
    document = json.loads(text)
    click.echo(text if as_json else f"{drift_table(document)}\n{path}")
    refuse_drift(document)
