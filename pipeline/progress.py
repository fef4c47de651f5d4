"""Progress lines on stderr."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

logger = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 30.0


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {task.fields['unit']}/s" if speed else "", style="cyan")


class ProgressLine:
    """One line of progress: done / total, rate, time left.

    On a terminal rich updates it in place; elsewhere a line is logged every half minute and at the
    end, so that the log of a batch job stays short.
    """

    def __init__(self, name: str, total: int | None, unit: str) -> None:
        self._terminal = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description:<32}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._id = self._terminal.add_task(name, total=total, unit=unit, note="")
        self._task = self._terminal.tasks[0]
        self._resumed_at = 0.0
        self._last_line = time.monotonic()

    @property
    def total(self) -> float | None:
        """How much there is to do, None while that is not known."""
        return self._task.total

    def advance(self, count: float, note: str = "") -> None:
        """Add to what is done, and say something beside it."""
        self._terminal.update(self._id, advance=count, note=note)
        if self._terminal.disable and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._log()

    def set(self, done: int, total: int, note: str = "") -> None:
        """Say how much is done of what total, for work that counts by itself (or resumes)."""
        if self.total != total:
            self._resumed_at = done - 1
            self._terminal.update(self._id, total=total, completed=self._resumed_at)
        self.advance(done - self._task.completed, note)

    def __enter__(self) -> "ProgressLine":
        self._terminal.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._terminal.stop()
        if self._terminal.disable and self._task.completed:
            self._log()

    def _log(self) -> None:
        self._last_line = time.monotonic()
        task, unit = self._task, self._task.fields["unit"]
        rate = (task.completed - self._resumed_at) / max(task.elapsed or 0.0, 1e-9)
        line = f"{task.description}  {task.completed:,.0f}"
        line += f" / {task.total:,.0f}" if task.total else ""
        line += f" {unit}  {rate:,.1f} {unit}/s"
        if rate and (task.remaining or 0) > 0:
            line += f", {duration((task.remaining or 0) / rate)} left"
        note = task.fields["note"]
        logger.info("%s", f"{line}  {note}" if note else line)


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Log how long something took."""
    started = time.monotonic()
    yield
    logger.info("%s took %s", name, duration(time.monotonic() - started))


def duration(seconds: float) -> str:
    """Return a duration in words: `3.2 s`, `4 min 10 s`, `1 h 56 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
