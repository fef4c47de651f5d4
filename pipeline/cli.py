"""The `sail` command. Options are parsed here; the work is done elsewhere in `pipeline`.

Nothing heavy is imported at the top, so that `sail --help` answers at once.
"""

import json
from pathlib import Path
from typing import Any

import click

from features.errors import SailError
from pipeline.commands.convert import convert, import_store
from pipeline.commands.eval import evaluate
from pipeline.commands.explore import explore
from pipeline.commands.export import export
from pipeline.commands.options import run_stage, stage, trainings
from pipeline.commands.readonly import doctor, inspect, plan, verify
from pipeline.commands.rewrite import merge, rechunk, reorder, subset
from pipeline.commands.study import compare, pick, study
from pipeline.commands.use import embed, search
from pipeline.commands.values import count_of, seeds_of, settings_of

SECTIONS = {
    "The three stages": ("extract", "align", "eval"),
    "Look": ("explore", "search", "inspect", "verify", "compare"),
    "Before a long run": ("doctor", "plan", "pick", "study"),
    "Try settings": ("sweep", "scaling"),
    "Hand over": ("embed", "export", "export-head", "import-head"),
    "Stores": ("convert", "import-store", "merge", "subset", "rechunk", "reorder"),
}


class Commands(click.Group):
    """A command group that reports what a user can put right in one line, without a traceback.

    Its help lists the commands by what they are for.
    """

    def format_commands(  # noqa: D102
        self,
        ctx: click.Context,  # noqa: ARG002
        formatter: click.HelpFormatter,
    ) -> None:
        for title, names in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(f"{name:12}", self.commands[name].get_short_help_str(60)) for name in names]
                )

    def invoke(self, ctx: click.Context) -> object:  # noqa: D102
        try:
            return super().invoke(ctx)
        except SailError as error:
            raise click.ClickException(str(error)) from error
        except BrokenPipeError:
            raise
        except OSError as error:
            place = f" {error.filename}:" if error.filename else ""
            raise click.ClickException(
                f"The operating system refused:{place} {error.strerror or error}. A place that can "
                f"be read and written, with room on the disk, was expected. Check `run.dir` and "
                f"the paths of the recipe; what was done is kept."
            ) from error


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog='`eval "$(_SAIL_COMPLETE=bash_source sail)"` completes these with Tab in bash '
    "(zsh_source, fish_source in those shells).",
)
@click.version_option(package_name="sail")
def cli() -> None:
    """Align a frozen image encoder with a frozen text encoder.

    RECIPE is the path of a TOML file, or the name of one that ships with the program: demo,
    sail-small, sail, sail-paper. docs/recipes.md lists every setting.
    """


for command in (
    evaluate,
    plan,
    doctor,
    inspect,
    verify,
    search,
    explore,
    embed,
    export,
    convert,
    import_store,
    merge,
    subset,
    rechunk,
    reorder,
    compare,
    study,
    pick,
):
    cli.add_command(command)


@cli.command()
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
    from pipeline import run

    if scheduler is not None and workers is not None:
        raise click.UsageError("--scheduler has workers of its own: leave --workers out.")

    def work(config: Any, stop: Any) -> list[str]:
        stores = run.extract(config, stop, append=append, scheduler=scheduler, workers=workers)
        return [str(path) for path in stores]

    run_stage(recipe, overrides, work, as_json=as_json, verbose=verbose)


@cli.command()
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
    from pipeline.training.stage import align_run

    def work(config: Any, stop: Any) -> list[str] | None:
        best = align_run(config, stop)
        return None if best is None else [str(best)]

    run_stage(recipe, overrides, work, as_json=as_json, verbose=verbose)


@cli.command()
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


@cli.command()
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


@cli.command(name="import-head")
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


@cli.command(name="export-head")
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


if __name__ == "__main__":
    cli()
