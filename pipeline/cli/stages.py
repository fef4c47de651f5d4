"""The three stages: `sail extract`, `sail align`, `sail eval`.

Nothing heavy is imported at the top, so that `sail --help` answers at once.
"""

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from pipeline.cli.options import (
    Stage,
    optional_stage,
    say,
    say_json,
    say_paths,
    stage,
    start_log,
    until_stopped,
)


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
def extract(run: Stage, append: bool, scheduler: str | None, workers: int | None) -> None:
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
    from pipeline.run import extract as stage_one

    if scheduler is not None and workers is not None:
        raise click.UsageError("--scheduler has workers of its own: leave --workers out.")

    def work(config: Any, stop: Any) -> Any:
        return stage_one.extract(config, stop, append=append, scheduler=scheduler, workers=workers)

    _print_paths(run, run.run(work))


@click.command()
@click.option(
    "--closed-form",
    is_flag=True,
    help="No training: one pass over the features, and the linear head that follows from it.",
)
@stage
def align(run: Stage, closed_form: bool) -> None:
    """Train the head on the feature stores (stage two).

    Resumes by itself from its last checkpoint. Prints the path of the best checkpoint. Several
    processes, on as many GPUs, train one head under torchrun. docs/heads.md has what is trained
    where the run file does not say.

    \b
    Examples:
      sail align demo
      sail align my.toml --closed-form --set run.dir=runs/closed --set run.features=runs/my
      sail align my.toml --set align.head.kind=linear --set run.seed=1
      torchrun --nproc-per-node 4 -m pipeline.cli align my.toml
    """
    from pipeline.run.align import CLOSED_FORM, align_run

    if closed_form:
        run = replace(run, overrides=(*run.overrides, *CLOSED_FORM))
    if (best := run.run(align_run)) is not None:
        _print_paths(run, [best])


def _print_paths(run: Stage, paths: Iterable[object]) -> None:
    texts = [str(path) for path in paths]
    if run.as_json:
        say_json(texts)
    else:
        say_paths(texts)


@click.command(name="eval")
@click.option(
    "--check",
    is_flag=True,
    help="Instead, embed some rows in several ways and see how far the embeddings drift.",
)
@click.option("--suite", help="Instead, measure a head on a published suite; without RECIPE.")
@click.option("--head", help="Of --suite: a run, an exported folder, a released .pt, or hf://….")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Of --suite: the folder of its data sets, in their authors' layouts.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Of --suite: run folder; runs/SUITE if not given.",
)
@click.option(
    "--mteb",
    "tasks",
    multiple=True,
    metavar="TASK",
    help="Instead, let mteb measure the run on a task of its own; may be repeated.",
)
@optional_stage
def evaluate(
    run: Stage,
    check: bool,
    tasks: tuple[str, ...],
    suite: str | None,
    head: str | None,
    data: Path | None,
    out: Path | None,
) -> None:
    """Measure the trained head; write its results and report.

    Prints a table, and the paths of results.json and report.html in run.dir/eval.

    --suite measures any head on the data sets of a publication that are there, with its protocol,
    and shows the published numbers beside: no run file is needed. docs/paper.md lists the suites.

    --mteb lets mteb (extra `mteb`) measure the run on tasks of its own, whose data it fetches from
    the hub. Features are kept in run.dir/mteb, or that of run.features, for other heads.

    --check tells how far embeddings drift with batch size, padding, image mode and device, and
    from the store; check.json is beside those. Exit 1 above eval.check.tolerance.

    \b
    Examples:
      sail eval demo
      sail eval my.toml --json | jq '.results[] | [.task, .metric, .value]'
      sail eval my.toml --check
      sail eval --suite sail-released --head hf://le723z/sail/sail_dinov2l_nv2.pt --data /data
    """
    if suite is not None:
        _suite(run, suite, head, data, out)
        return
    if not run.recipe or head or data or out:
        raise click.UsageError("Give a RECIPE, or --suite with --head and --data.")
    if check:
        _check(run)
        return
    if tasks:
        _mteb(run, tasks)
        return
    from pipeline.run.evaluate import evaluate_run, results_table

    results = run.run(evaluate_run)
    run.show(results, lambda _: results_table(results), results, results.with_name("report.html"))


def _suite(run: Stage, suite: str, head: str | None, data: Path | None, out: Path | None) -> None:
    if run.recipe or head is None or data is None:
        raise click.UsageError("--suite needs --head and --data, and takes no RECIPE.")
    from pipeline.run.cpu import keep_freed_memory
    from pipeline.run.evaluate import published_table, results_table
    from pipeline.suites import run_suite

    if run.verbose:
        start_log(logging.DEBUG)
    keep_freed_memory()
    results, config = until_stopped(
        lambda stop: run_suite(suite, head, data, out, run.overrides, stop)
    )
    run.show(
        results,
        lambda _: f"{results_table(results)}\n{published_table(results, config)}",
        results,
        results.with_name("report.html"),
    )


def _mteb(run: Stage, tasks: tuple[str, ...]) -> None:
    from pipeline.mteb_model import evaluate_by_mteb
    from pipeline.python import load_aligned
    from pipeline.tables import scores_table

    def work(config: Any, _stop: Any) -> Any:
        folder = (config.run.features or config.run.dir) / "mteb"
        return evaluate_by_mteb(load_aligned(config.run.dir, config.run.device), tasks, folder)

    found = run.run(work)
    if run.as_json:
        say_json(found, indent=1)
    else:
        say(scores_table(found))


def _check(run: Stage) -> None:
    from pipeline.run.check import check_run, refuse_drift
    from pipeline.tables import drift_table

    path = run.run(check_run, kept="nothing was written.")
    refuse_drift(run.show(path, drift_table, path))
