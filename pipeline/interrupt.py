"""SIGINT and SIGTERM as a request to stop at the next safe moment."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class Stopped(Exception):  # noqa: N818 - not an error: a signal asked for it
    """The run stopped at a safe moment because a signal asked it to."""


@dataclass
class StopRequest:
    """Whether a signal asked the run to stop, and which."""

    signal_number: int | None = None

    def __call__(self) -> bool:
        """Return whether to stop."""
        return self.signal_number is not None

    def check(self) -> None:
        """Raise `Stopped` if a signal came. To be called where stopping is safe."""
        if self():
            raise Stopped

    @property
    def exit_code(self) -> int:
        """The shell's convention for a process that a signal ended: 130 or 143."""
        return 128 + (self.signal_number or 0)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request; a second one ends the process at once."""
    request = StopRequest()

    def remember(number: int, _frame: FrameType | None) -> None:
        request.signal_number = number
        for each in previous:  # the second signal has its ordinary effect
            signal.signal(each, signal.SIG_DFL)

    previous = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    for each in previous:
        signal.signal(each, remember)
    try:
        yield request
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
