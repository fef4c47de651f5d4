"""Each call by which a command changes files fails in turn, once and for good.

Then the command ends with exit code 1 and one line, nothing wrong has its final name, and the same
command ends afterwards with the bytes of an undisturbed one. The calls are those of the process,
whichever library makes them.
"""

import errno
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.disturbed import COMMANDS, Work
from tests.processes import forks
from tests.system_calls import REMOVING, Call, needs_system_calls

pytestmark = needs_system_calls
ERRORS = (errno.ENOSPC, errno.EIO)
MOST = int(os.environ.get("FAILING_CALLS", "6"))
"""Of the calls of a command that fail in turn, evenly spaced where there are more; 1000 is all."""


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
    again = work.run_here()
    is_done = any(
        words in again.stderr for words in ("There is something at", "has a head already")
    )
    if (different := work.different()) or (again.code and not is_done):
        yield f"afterwards exit code {again.code}, different: {different}: {again.stderr}"


def check(work: Work, failures: Iterable[Failing]) -> None:
    found = []
    for failing in failures:
        if faults := list(faults_of(work, failing)):
            first = failing.failed[0]
            how = f"{errno.errorcode[failing.error]} {'for good' if failing.for_good else 'once'}"
            found += [
                f"{failing.number} {first.name} {first.paths}, {how}: {each}" for each in faults
            ]
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_call_of_a_command_fails_once_and_for_good(name: str, tmp_path: Path) -> None:
    work = Work(COMMANDS[name], tmp_path / "w", forks())
    assert len(work.calls) > 5
    step = -(-len(work.calls) // MOST)
    check(
        work,
        (
            Failing(number, ERRORS[(number + for_good) % 2], for_good)
            for number in range(0, len(work.calls), step)
            for for_good in (False, True)
        ),
    )


@pytest.mark.slow
def test_some_calls_of_a_conversion_to_hdf5_fail(tmp_path: Path) -> None:
    work = Work(COMMANDS["to hdf5"], tmp_path / "w", forks())
    numbers = range(10, len(work.calls), 60)
    check(work, (Failing(each, ERRORS[each % 2], for_good=each % 3 == 0) for each in numbers))
