"""A small run with everything that `sail explore` shows, and the page over it."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pipeline.explore.server import access_for, serve
from pipeline.explore.session import Session
from pipeline.interrupt import Stopped, StopRequest
from pipeline.run.align import align_run
from pipeline.run.config import load_config
from pipeline.run.evaluate import evaluate_run
from pipeline.run.extract import extract
from tests import tiny

BROKEN = 3
"""The row of the test split whose image is damaged."""
HOSTILE = '<img src="/x" onerror="document.title = 1"> & <b>bold</b> "words" of a stranger'
"""The long caption of the row after it."""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no chromium on this machine (apt-get install chromium)"
)


def make_run(folder: Path) -> Path:
    """Extract, align and evaluate a small world with one damaged image; return the run's folder."""
    run_file = tiny.world(folder, rows=48)
    members = tiny.samples(16, first=1000)
    name, image = members[2 * BROKEN]
    members[2 * BROKEN] = (name, image[: len(image) // 3])
    name, record = members[2 * BROKEN + 3]
    members[2 * BROKEN + 3] = (name, json.dumps(json.loads(record) | {"long": HOSTILE}).encode())
    tiny.write_tar(folder / "shards" / "test-0.tar", members)
    config = load_config(str(run_file), ["eval.zero_shot=['test']"])
    extract(config, StopRequest())
    align_run(config, StopRequest())
    evaluate_run(config, StopRequest())
    return config.run.dir


@contextmanager
def served(run: Path, *, host: str = "127.0.0.1", token: str | None = None) -> Iterator[str]:
    """Serve a run as the command does, and yield the address it prints."""
    stop, addresses = StopRequest(), list[str]()
    session, access = Session(run, device="cpu"), access_for(host, token)

    def work() -> None:
        with suppress(Stopped):
            serve(session, access, 0, stop, addresses.append)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        while not addresses and thread.is_alive():
            time.sleep(0.02)
        yield addresses[0]
    finally:
        stop.signal_number = 15
        thread.join()
