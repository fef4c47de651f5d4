"""Each call by which a command changes files fails in turn, once and for good.

Then the command ends with exit code 1 and one line, nothing wrong has its final name, and the same
command ends afterwards with the bytes of an undisturbed one. The calls are those of the process,
whichever library makes them.
"""

import errno
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.disturbed import COMMANDS, Work
from tests.processes import forks
from tests.system_calls import REMOVING, Call, needs_system_calls

pytestmark = needs_system_calls
ERRORS = (errno.ENOSPC, errno.EIO)


@dataclass
class Failing:
    """Lets a call fail: once, or from then on every one."""

    number: int
    """From 0."""
    error: int
    for_good: bool
    seen: int = -1
    failed: list[Call] = field(default_factory=list)

    def __call__(self, call: Call) -> int | None:
        if call.name in REMOVING and self.error == errno.ENOSPC:
            return None  # needs no room
        self.seen += 1
        if self.seen == self.number or (self.for_good and self.seen > self.number):
            self.failed.append(call)
            return self.error
        return None


def faults_of(work: Work, failing: Failing) -> Iterator[str]:
    """Let a command fail, run it again, and yield what was not as promised."""
    work.restart()
    ended = work.run(failing)
    if not failing.failed:  # the threads of this run made fewer calls
        return
    errors = [line for line in ended.stderr.splitlines() if line.startswith("Error: ")]
    told = ended.code == 1 and len(errors) == 1 and ended.stdout == ""
    if ended.code != 0 and not told:
        yield f"exit code {ended.code}, {len(errors)} lines of error, {ended.stdout!r}"
    yield from (
        f"{words!r} in {ended.stderr}"
        for words in ("Traceback", "Exception ignored", "Fatal")
        if words in ended.stderr
    )
    if wrong := work.wrong():
        yield f"wrong, exit code {ended.code}: {wrong}"
    if ended.code == 0 and (different := work.different()):
        yield f"exit code 0, but different: {different}"
    again = work.run()
    if (different := work.different()) or (
        again.code and "There is something at" not in again.stderr
    ):
        yield f"afterwards exit code {again.code}, different: {different}: {again.stderr}"


def check(work: Work, numbers: range) -> None:
    found = []
    for number in numbers:
        for for_good in (False, True):
            failing = Failing(number, ERRORS[(number + for_good) % 2], for_good)
            faults = list(faults_of(work, failing))
            if faults:
                first = failing.failed[0] if failing.failed else None
                what = f"{first.name} {first.paths}" if first else "nothing"
                how = f"{errno.errorcode[failing.error]} {'for good' if for_good else 'once'}"
                found += [f"call {number} ({what}), {how}: {fault}" for fault in faults]
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_call_of_a_command_fails_once_and_for_good(name: str, tmp_path: Path) -> None:
    work = Work(COMMANDS[name], tmp_path / "w", forks())
    assert len(work.calls) > 5
    check(work, range(len(work.calls)))


@pytest.mark.parametrize("name", ["to hdf5", "rechunk"])
def test_some_calls_of_a_command_fail_once_and_for_good(name: str, tmp_path: Path) -> None:
    work = Work(COMMANDS[name], tmp_path / "w", get_context("fork"))
    check(work, range(3, len(work.calls), 29))
