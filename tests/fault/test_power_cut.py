"""After a power cut at any moment the same command ends with the bytes of an undisturbed one.

The calls of a run are followed; at many of them what a power cut may leave is written down: of what
was not synchronised any part is lost, torn or kept, in any order. Where the command cannot go on
from that, it says what it cannot read.
"""

import os
import random
import shutil
from pathlib import Path

import pytest

from tests.disturbed import COMMANDS, Work
from tests.power_cut import Disk
from tests.processes import forks
from tests.system_calls import Call, needs_system_calls

pytestmark = needs_system_calls

CUTS = int(os.environ.get("POWER_CUTS", "30"))
"""Moments at which the power is cut, for each command."""


def left_after_cuts(work: Work, folder: Path, count: int) -> list[Path]:
    """Run a command, and return folders with what as many power cuts during it leave."""
    folder.mkdir()
    chance = random.Random(0)
    moments = [chance.randrange(1, len(work.calls)) for _ in range(count)]
    work.restart()
    disk, seen = Disk(work.folder), 0
    left: list[Path] = []

    def follow(call: Call) -> None:
        nonlocal seen
        for _ in range(moments.count(seen)):
            left.append(folder / f"{len(left)}")
            disk.cut(left[-1], chance)
        disk.follow(call)
        seen += 1

    ended = work.run(follow)
    assert ended.code == 0, ended.stderr
    return left


def check(name: str, folder: Path, count: int, *, refused: int) -> None:
    """See what becomes of a command after some power cuts.

    Args:
        name: Of the command.
        folder: To work in.
        count: Of power cuts.
        refused: How many of them may make the command refuse to go on.
    """
    work = Work(COMMANDS[name], folder / "w", forks())
    found, refusals = [], []
    for left in left_after_cuts(work, folder / "left", count):
        kept = folder / "kept"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(left, kept, symlinks=True)
        shutil.rmtree(work.folder)
        left.rename(work.folder)
        ended = work.run_here()
        errors = [line for line in ended.stderr.splitlines() if line.startswith("Error: ")]
        if ended.code == 0:
            if different := work.different():
                found.append(f"{left.name}: different, and not a word: {different}")
        elif ended.code == 1 and len(errors) == 1 and str(work.folder) in errors[0]:
            refusals.append(errors[0])
        else:
            found.append(f"{left.name}: exit code {ended.code}: {ended.stderr}")
    assert not found, "\n".join(found)
    assert len(refusals) <= refused, "\n".join(refusals)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["extract", "append", "align", "rechunk", "to hdf5"])
def test_power_cuts_leave_what_the_same_command_finishes(name: str, tmp_path: Path) -> None:
    check(name, tmp_path, CUTS, refused=0)
