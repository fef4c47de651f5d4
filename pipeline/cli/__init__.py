"""The `sail` command: its help, and how errors end it. The files beside this one have the commands.

Nothing heavy is imported at the top, so that `sail --help` answers at once.
"""

import itertools

import click

from pipeline.cli.begin import init, settings
from pipeline.cli.checks import doctor, encoders, inspect, plan, verify
from pipeline.cli.fence import fence
from pipeline.cli.options import start_log
from pipeline.cli.stages import align, evaluate, extract
from pipeline.cli.stores import convert, import_store, merge, rechunk, reorder, repair, subset
from pipeline.cli.studies import compare, pick, scaling, study, sweep
from pipeline.cli.use import embed, explore, export, export_head, import_head, search

SECTIONS = {
    "Begin": (init, settings),
    "The three stages": (extract, align, evaluate),
    "Look": (explore, search, inspect, verify, compare),
    "Before a long run": (doctor, encoders, plan, pick, study),
    "Try settings": (sweep, scaling),
    "Hand over": (embed, export, export_head, import_head),
    "Stores": (repair, convert, import_store, merge, subset, rechunk, reorder),
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
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(f"{each.name:12}", each.get_short_help_str(60)) for each in commands]
                )

    def invoke(self, ctx: click.Context) -> object:  # noqa: D102
        with fence():
            return super().invoke(ctx)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog='`eval "$(_SAIL_COMPLETE=bash_source sail)"` completes these with Tab in bash '
    "(zsh_source, fish_source in those shells).",
)
@click.version_option(package_name="sail")
def cli() -> None:
    """Align a frozen image encoder with a frozen text encoder.

    RECIPE and RUN are the same: the path of a run file (TOML), the folder of a run, or the name of
    a recipe that ships with the program: demo, sail-small, sail, sail-paper. `sail settings` lists
    every setting. STORE may be a run that has one store.
    """
    start_log()


for command in itertools.chain.from_iterable(SECTIONS.values()):
    cli.add_command(command)
