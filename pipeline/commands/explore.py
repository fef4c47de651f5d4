"""The command of `sail` that serves a page.

Nothing heavy is imported at the top, so that `sail --help` answers at once.
"""

from pathlib import Path
from typing import Any

import click

from pipeline.commands.options import until_stopped


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen at. Any but this machine's own asks for a token.",
)
@click.option(
    "--port",
    default=8642,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="Port to listen at; 0 takes any that is free.",
)
@click.option(
    "--token",
    envvar="SAIL_TOKEN",
    metavar="WORD",
    help="What a browser must know; made and printed where one is needed and none is given.",
)
@click.option(
    "--memory",
    default=2.0,
    show_default=True,
    metavar="GIB",
    type=click.FloatRange(min=0),
    help="What one search index may take; beyond it, rows are compared from disk.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Where images and sentences are encoded: cpu, cuda, mps, or auto.",
)
def explore(run: Path, host: str, port: int, token: str | None, memory: float, device: str) -> None:
    """Look at a run in a browser, and search in it.

    RUN is the folder of a run. The views are search, map, results, training and store. Prints the
    address to open, and serves until Ctrl-C. Training is shown live, also before there is a head.
    docs/explore.md tells more.

    \b
    Examples:
      sail explore runs/demo
      sail explore runs/demo --port 0
      sail explore runs/demo --host 0.0.0.0
    """
    from pipeline.explore.server import access_for, serve
    from pipeline.explore.session import Session
    from pipeline.progress import start_log

    start_log(verbose=False)
    access = access_for(host, token)
    session = Session(run, device=device, memory_bytes=int(memory * 2**30))

    def work(stop: Any) -> None:
        serve(session, access, port, stop, on_ready=click.echo)

    until_stopped(work, kept="nothing of the run was changed.")
